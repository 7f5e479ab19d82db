"""The command line as a user meets it: output, exit codes, and no torch before it is needed."""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Annotated, get_args, get_origin, get_type_hints

import command_line
import pytest
from repository import ROOT

import aegpo
from aegpo.commands.cli import app
from aegpo.config.schema import file_schema
from aegpo.core.experiment import Experiment
from aegpo.core.verdicts import VerdictSpec
from aegpo.plugin.manager import load_registries, plugin_manager

ABLATION = ROOT / "experiments" / "ablation.yaml"
QUICK = (
    ["--help"],
    ["run", "--help"],
    ["profile-entropy", "--help"],
    ["check", str(ABLATION)],
    ["plugins"],
    ["plugins", "trees/branching"],
    ["schema"],
)
LATE = {"filelock", "jinja2", "requests", "scipy", "urllib3"}
HEAVY = {"torch", "diffusers", "transformers", "accelerate", "peft", "matplotlib", "safetensors", "PIL"} | LATE


WITH_A_CAUTION = """\
training_steps: 1
prompts: {train_count: 2, evaluation_count: 2}
rollouts: {prompts_per_step: 1, rollouts_per_step: 2, denoising_steps: 2}
model: shapes
rewards: [palette]
allocator: uniform
selector: uniform
tree: independent
objective: {kind: clipped, clip: 1.0e-6}
sampler: flow-sde
advantage: group
"""


def call(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "aegpo", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("arguments", QUICK, ids=" ".join)
def test_answers_come_without_loading_anything_heavy(arguments):
    code = f"""
import sys
sys.argv = {["aegpo", *arguments]!r}
from aegpo.commands.cli import main
try:
    main()
except SystemExit as done:
    assert not done.code, done.code
print(sorted({HEAVY!r} & set(sys.modules)), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "[]"
    assert done.stdout


def test_check_costs_little_more_than_importing_its_libraries():
    """3.5 times the libraries' own import on an idle core, up to 4.2 on a busy one; twice that is a regression."""

    def processor_seconds(command: list[str]) -> float:
        spent = []
        for _ in range(3):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([sys.executable, *command], capture_output=True, check=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        return min(spent)

    floor = processor_seconds(["-c", "import numpy, pluggy, pydantic.main, rich.console, rich.table, typer, yaml"])
    assert processor_seconds(["-m", "aegpo", "check", str(ABLATION)]) < 7 * floor


def test_the_version_is_the_distributions():
    assert call("--version").stdout == f"aegpo {aegpo.__version__}\n"


def test_a_mistake_in_a_file_is_a_message_and_exit_code_2(tmp_path):
    (tmp_path / "x.yaml").write_text("rewards: [pallete]\n")
    done = call("check", "x.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: 2 mistakes\nx.yaml:1:1: model: required, but not given; known: ")
    assert "x.yaml:1:11: rewards.0: unknown kind 'pallete'; did you mean 'palette'?" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nope.yaml"], "error: nope.yaml: cannot be read: No such file or directory"),
        (["plugins", "allocators/entrpy"], "error: no allocators part is called 'entrpy'; did you mean 'entropy'?"),
        (["plugins", "allocator/entropy"], "error: no kind of part is called 'allocator'; did you mean 'allocators'?"),
        (["plugins", "--plugin", "nope"], "error: plugin module 'nope' cannot be imported: ModuleNotFoundError: "),
        (["run", str(ABLATION), "--arm", "nope"], "error: "),
        (["run", str(ABLATION), "--seed", "99"], "error: "),
        (["check", str(ABLATION), "--set", "x"], "error: --set: 'x' is not of the form key.path=value"),
    ],
)
def test_every_mistake_of_the_user_is_one_message_and_exit_code_2(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    done = command_line.aegpo(*arguments)
    assert done.code == 2
    assert done.stderr.startswith(message)
    assert "Traceback" not in done.stderr


def test_a_blocked_name_that_matches_nothing_is_a_message_too(monkeypatch):
    monkeypatch.setenv("AEGPO_BLOCK_PLUGINS", "no-such-plugin")
    done = command_line.aegpo("plugins")
    assert done.code == 2
    assert done.stderr.startswith("error: AEGPO_BLOCK_PLUGINS names 'no-such-plugin', but no plugin is called that; ")


def test_check_shows_what_differs_between_arms_and_nothing_else():
    shown = command_line.aegpo("check", str(ABLATION)).stdout
    table = shown.partition("What a training step costs")[0]
    keys = re.findall(r"│ (\S+\.\S+|name|seed|training_steps|device) ", table)
    assert "allocator.kind" in keys
    assert "selector.kind" in keys
    assert not {"model.kind", "name", "seed", "training_steps", "sampler.noise_level", "rewards.0.kind"} & set(keys)


def test_check_shows_the_cost_of_each_arm():
    shown = command_line.aegpo("check", str(ABLATION), "--set", "training_steps=5", "--set", "seeds=[0, 1]").stdout
    rows = [line.split("│")[1:-1] for line in shown.partition("costs")[2].splitlines() if line.startswith("│")]
    costs = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}
    assert set(costs) == {"grpo", "allocation", "selection", "aegpo", "control"}
    rollouts, forwards, per_rollout, edges, work, probe, runs, total = costs["grpo"]
    number = {name: int(text.replace(",", "")) for name, text in (("n", rollouts), ("f", forwards), ("e", edges))}
    assert number["f"] == number["n"] * float(per_rollout)
    assert int(work.replace(",", "")) == number["f"] + 3 * number["e"]
    assert (probe, runs) == ("-", "5 x 2")
    assert int(total.replace(",", "")) == 10 * int(work.replace(",", ""))
    assert costs["aegpo"][5] == "80 + 400 once"
    on_policy = ("--set", "training_steps=5", "--set", "signals.entropy.base_on=policy")
    assert "80 + 80 of the base" in command_line.aegpo("check", str(ABLATION), *on_policy).stdout


def test_check_shows_what_is_scored_beside_the_rollouts_where_an_advantage_asks():
    options = ("--set", "training_steps=5", "--set", "seeds=[0, 1]")
    plain = command_line.aegpo("check", str(ABLATION), *options).stdout
    assert "predicted" not in plain
    shown = command_line.aegpo("check", str(ABLATION), *options, "--set", "advantage=gain").stdout
    assert "beside the rollouts'" in shown
    rows = [line.split("│")[1:-1] for line in shown.partition("costs")[2].splitlines() if line.startswith("│")]
    costs = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}
    before = [line.split("│")[1:-1] for line in plain.partition("costs")[2].splitlines() if line.startswith("│")]
    assert costs["grpo"][:-1] == [cell.strip() for cell in before[0][1:]]  # the same forwards and work
    forwards, predicted = (int(costs["grpo"][column].replace(",", "")) for column in (1, -1))
    assert predicted == forwards  # all of 10 levels: what is predicted before each step of 10 and after 9 of them
    assert re.fullmatch(r"[\d,]+-[\d,]+", costs["aegpo"][-1])


def test_check_shows_that_joined_steps_cost_fewer_forwards():
    merged = ["--set", "arms={plain: {selector: fixed}, joined: {selector: {kind: merged, start: 2, length: 4}}}"]
    shown = command_line.aegpo("check", str(ABLATION), *merged).stdout
    rows = [line.split("│")[1:5] for line in shown.partition("costs")[2].splitlines() if line.startswith("│")]
    costs = {arm.strip(): [cell.strip() for cell in cells] for arm, *cells in rows}
    assert costs["plain"] == ["96", "960", "10.00"]
    assert costs["joined"] == ["96", "672", "7.00"]  # levels 3, 4 and 5 are passed through


@pytest.mark.parametrize(
    "command",
    [("check",), ("run", "--out", "runs", "--no-report", "--jobs", "1")],
    ids=["check", "run"],
)
def test_what_is_probably_not_meant_is_a_warning_with_its_line_and_stops_nothing(tmp_path, monkeypatch, command):
    (tmp_path / "x.yaml").write_text(WITH_A_CAUTION)
    name, *options = command
    monkeypatch.chdir(tmp_path)
    done = command_line.aegpo(name, "x.yaml", *options)
    assert done.code == 0, done.stderr
    (warning,) = [line for line in done.stderr.splitlines() if "warning" in line]
    assert warning.startswith(
        "warning: x.yaml:9:12: objective: 'clip' 1e-06 is more than 10 times below what fits here: "
    )
    assert done.stderr.split(warning)[1].startswith("\n  objective: {kind: clipped, clip: 1.0e-6}\n             ^\n")


def test_check_of_one_arm_has_no_table_of_differences(tmp_path):
    lines = ["model: shapes", "rewards: [palette]", "allocator: uniform", "selector: uniform", "tree: independent"]
    lines += ["sampler: flow-sde", "advantage: group", "objective: clipped"]
    (tmp_path / "x.yaml").write_text("\n".join(lines))
    done = command_line.aegpo("check", str(tmp_path / "x.yaml"))
    assert done.code == 0
    assert "differs" not in done.stdout
    assert re.search(r"│ main +│ +96 │", done.stdout)


def test_plugins_lists_every_part_with_its_first_line_and_who_ships_it():
    shown = command_line.aegpo("plugins").stdout
    for registry in load_registries(plugin_manager()):
        for entry in registry:
            (line,) = (line for line in shown.splitlines() if f" {registry.axis}/{entry.name} " in line)
            assert entry.source in line
            assert entry.summary[:40] in line


def test_plugins_of_one_part_shows_its_fields():
    shown = command_line.aegpo("plugins", "selectors/entropy-peak").stdout
    assert shown.startswith("selectors/entropy-peak, shipped by aegpo\n")
    assert re.search(r"│ top_k +│ whole number, >= 1, <= 1000 +│ 4 +│ denoising steps chosen", shown)
    assert re.search(r"│ scope +│ prompt \| batch +│ prompt +│", shown)
    assert re.search(r"│ last +│ true \| false +│ false +│", shown)


def test_every_field_of_every_part_has_a_description():
    for registry in load_registries(plugin_manager()):
        for entry in registry:
            for name, field in entry.spec.model_fields.items():
                assert name == "kind" or field.description, f"{registry.axis}/{entry.name}: {name}"


def test_the_schema_has_every_key_of_a_file_and_both_forms_of_a_part():
    schema = json.loads(command_line.aegpo("schema").stdout)
    assert schema == file_schema(load_registries(plugin_manager()))
    fields = set(Experiment.model_fields) - {"seed"}
    of_file = {"extends", "arms", "seeds", "measured", *VerdictSpec.model_fields}
    assert set(schema["properties"]) == fields | of_file
    assert schema["additionalProperties"] is False
    assert "required" not in schema
    names, long = schema["properties"]["allocator"]["anyOf"]
    assert set(names["enum"]) >= {"uniform", "random", "entropy"}
    assert set(long["discriminator"]["mapping"]) == set(names["enum"])
    assert "scene" in schema["properties"]["rewards"]["items"]["anyOf"][0]["enum"]
    evaluation = schema["$defs"]["EvaluationSpec"]["properties"]["rewards"]
    assert evaluation["items"] == schema["properties"]["rewards"]["items"]
    names, _ = schema["$defs"]["OptimizerSpec"]["properties"]["schedule"]["anyOf"]
    assert names["enum"] == ["constant", "cosine", "linear"]
    patch = schema["properties"]["arms"]["additionalProperties"]
    assert set(patch["properties"]) == fields - {"name"}


def test_every_reference_in_the_schema_leads_somewhere():
    text = json.dumps(schema := file_schema(load_registries(plugin_manager())))
    targets = set(re.findall(r'"#/\$defs/(\w+)"', text))
    assert targets
    assert targets <= set(schema["$defs"])


def test_every_command_and_option_has_help():
    from typer.main import get_command

    for command in get_command(app).commands.values():
        assert command.help
        assert all(parameter.help for parameter in command.params)


def test_every_number_of_the_command_line_has_bounds():
    """And each of a list."""
    numbers = {
        f"{command.callback.__name__}: {name}": settings
        for command in app.registered_commands
        for name, hint in get_type_hints(command.callback, include_extras=True).items()
        if get_origin(hint) is Annotated and re.search(r"\b(int|float)\b", str(get_args(hint)[0]))
        for settings in hint.__metadata__
    }
    assert len(numbers) > 12
    assert [name for name, settings in numbers.items() if None in (settings.min, settings.max)] == []


@pytest.mark.parametrize("seed", ["-1", str(2**63), "1e3", "0x10"])
@pytest.mark.parametrize("words", [["run"], ["profile-entropy"], ["sample", "--prompt", "x"], ["evaluate"]])
def test_a_seed_that_no_generator_takes_is_refused(words, seed):
    shown = command_line.aegpo(words[0], "x.yaml", *words[1:], "--seed", seed)
    assert shown.code == 2
    assert "Invalid value for '--seed'" in shown.stderr
