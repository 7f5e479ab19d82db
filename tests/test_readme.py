"""Every block of the README is run, loaded or parsed; every link leads somewhere."""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import nox.registry
import pytest
import typer
from command_line import aegpo
from repository import ROOT
from typer.testing import CliRunner

from aegpo.commands.cli import app
from aegpo.commands.launch_request import LaunchRequest
from aegpo.commands.run import launch
from aegpo.config.loading import load_experiment_file
from aegpo.plugin.manager import load_registries, plugin_manager
from aegpo.report.profile import csvs
from aegpo.testing import check_reward

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LASTING = ("run", "serve-reward")  # commands that go on for long; others test them
PROMPT_LINE = re.compile(r"# a line: (\{.*?\})")  # of a list of prompts
LAUNCHER = "torchrun --standalone --nproc-per-node 2 -m "  # of a command that others test
STEP = re.compile(r"\d{6}")
CHEAP = {  # the smallest run that still evaluates, branches and checkpoints
    "training_steps": 2,
    "prompts": "{train_count: 8, evaluation_count: 4}",
    "rollouts": "{prompts_per_step: 2, rollouts_per_step: 24, denoising_steps: 5}",
    "optimizer.rollouts_per_update": 24,
    "evaluation.images": 4,
}


@dataclass(frozen=True)
class Block:
    """A fenced block; the first line of a file's block is a comment with its path."""

    language: str
    text: str

    @property
    def path(self) -> str:
        found = re.match(r"# (\S+\.\w+)\n", self.text)
        assert found, f"the block must begin with a comment that names its file:\n{self.text}"
        return found[1]


BLOCKS = [Block(*found) for found in FENCE.findall(TEXT)]


def texts(language):
    return [block.text for block in BLOCKS if block.language == language]


def commands(first):
    """The command lines of the page that begin with a word, as lists of words."""
    lines = [line for text in texts("bash") for line in text.splitlines()]
    lines = [line.removeprefix(LAUNCHER) for line in lines]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.split()[0] == first]


def shown(words):
    return " ".join(words) or "(alone)"


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with the experiments and the files of the page, as its reader would have."""
    shutil.copytree(ROOT / "experiments", tmp_path / "experiments")
    for block in BLOCKS:
        if block.language in ("python", "yaml"):
            (tmp_path / block.path).write_text(block.text)
    (shown,) = PROMPT_LINE.findall(TEXT)
    colours, shapes = ("green", "blue", "yellow", "purple"), ("circle", "square")
    rows = [shown, *(f'"a {colour} {shape}"' for colour in colours for shape in shapes)]  # more than a step asks
    (tmp_path / "experiments" / "prompts.jsonl").write_text("".join(f"{row}\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def runs(tmp_path_factory, tiny_weights):
    """What the main job leaves, as far as the commands of the page look at it: one run, the smallest there is."""
    out = tmp_path_factory.mktemp("runs")
    cheap = [f"{key}={value}" for key, value in CHEAP.items()]
    overrides = (*cheap, f"model.weights={tiny_weights}", "device=cpu")
    request = LaunchRequest(
        ROOT / "experiments" / "ablation.yaml", overrides, arms=("aegpo",), seeds=(0,), out=out, report=False
    )
    assert launch(request) == 0
    return out


@pytest.fixture
def modules(workplace):
    return [block.path for block in BLOCKS if block.language == "python"]


def test_the_page_begins_with_the_line_for_the_main_job_and_the_line_for_the_tests():
    main_job, tests = texts("bash")[:2]
    assert main_job.count("\n") == tests.count("\n") == 1
    assert main_job.endswith("&& .venv/bin/aegpo run experiments/ablation.yaml\n")
    assert tests.endswith("&& .venv/bin/python -m pytest\n")


def test_every_block_is_of_a_kind_that_is_tested():
    assert {block.language for block in BLOCKS} == {"bash", "python", "yaml", "text"}
    assert len(texts("text")) == 1


def test_every_command_line_begins_with_a_program_that_is_tested():
    lines = [line.removeprefix(LAUNCHER) for text in texts("bash") for line in text.splitlines()]
    assert {line.split()[0] for line in lines} == {"python3", "aegpo", "nox", "python"}


@pytest.mark.parametrize("path", re.findall(r"\]\(([^)]+)\)", TEXT))
def test_every_link_leads_to_something_in_the_repository(path):
    assert (ROOT / path).exists()


@pytest.mark.parametrize("words", commands("aegpo"), ids=shown)
def test_every_command_is_accepted_with_its_file_arms_and_seeds(words, workplace):
    name, *rest = words
    context = typer.main.get_command(app).commands[name].make_context(name, list(rest))
    given = context.params
    if "file" not in given:
        return
    registries = load_registries(plugin_manager(given["plugin"]))
    file = load_experiment_file(Path(given["file"]), registries, given["overrides"])
    assert set(given.get("arm", ())) <= set(file.arms)
    assert set(given.get("seed", ())) <= set(file.seeds)


@pytest.mark.parametrize("words", [words for words in commands("aegpo") if words[0] not in LASTING], ids=shown)
def test_every_command_that_trains_nothing_succeeds(words, workplace, runs):
    shutil.copytree(runs, workplace / "runs")
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0
    assert result.stdout.strip()


def test_every_command_of_the_command_line_is_on_the_page():
    assert {words[0] for words in commands("aegpo")} | {"watch"} == set(typer.main.get_command(app).commands)


@pytest.mark.parametrize("name", ["run", "profile-entropy"])
def test_every_option_on_the_page_exists_and_those_of_the_main_commands_that_are_not_on_it_are_few(name):
    found = typer.main.get_command(app).commands
    options = {each: {option for param in command.params for option in param.opts} for each, command in found.items()}
    on_the_page = set(re.findall(r"--[a-z]+(?:-[a-z]+)*", TEXT.replace(LAUNCHER, "")))
    assert on_the_page <= set().union(*options.values())
    assert options[name] - on_the_page <= {"file", "path", "--help", "-h", "--no-report", "--plain"}


def test_the_columns_of_the_profile_are_on_the_page():
    assert all(f"`{column}`" in TEXT for column in (*csvs.ENTROPY, *csvs.PROMPTS))


@pytest.mark.parametrize("words", commands("nox"), ids=shown)
def test_every_session_of_nox_exists(words, monkeypatch):
    monkeypatch.setattr(nox.registry, "_REGISTRY", {})
    load(ROOT / "noxfile.py")
    sessions = nox.registry.get()
    assert set(words[1:2]) <= set(sessions)
    for name in sessions:
        assert name in TEXT, f"nox session {name!r} is not on the page"


@pytest.mark.parametrize("words", [words for words in commands("python") if words[0] == "-m"], ids=shown)
def test_what_pytest_is_to_run_is_there(words):
    assert words[1] == "pytest"
    assert all((ROOT / word).is_dir() for word in words[2:] if word not in ("-m", "not faults"))


@pytest.mark.parametrize("words", [words for words in commands("python") if words[0] != "-m"], ids=shown)
def test_every_tool_takes_its_arguments(words):
    script, *rest = words
    assert load(ROOT / script).command_line().parse_args(rest)


def load(path):
    spec = importlib.util.spec_from_file_location(f"loaded_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "yaml"], ids=lambda block: block.path)
def test_every_experiment_file_loads_with_every_arm_and_seed(block, workplace, modules):
    file = load_experiment_file(Path(block.path), load_registries(plugin_manager(modules)))
    assert file.name == Path(block.path).stem
    assert all(file.experiment(arm, seed).seed == seed for arm in file.arms for seed in file.seeds)


def test_the_reward_is_a_plugin_that_conforms(workplace, modules, monkeypatch):
    monkeypatch.syspath_prepend(workplace)
    names = [Path(module).stem for module in modules]
    own = [entry for entry in load_registries(plugin_manager(names)).rewards if entry.source in names]
    assert [entry.name for entry in own] == names
    for entry in own:
        check_reward(entry.spec())


def test_a_run_with_the_reward_leaves_the_folder_that_the_page_shows(workplace, tiny_weights):
    words = next(words for words in commands("aegpo") if words[0] == "run" and "--plugin" in words)
    cheap = [word for key, value in CHEAP.items() for word in ("--set", f"{key}={value}")]
    chosen = ["--arm", "grpo", "--arm", "aegpo", "--seed", "0", "--set", f"model.weights={tiny_weights}"]
    done = aegpo(*words, *chosen, *cheap)
    assert done.code == 0, done.stdout + done.stderr
    folder = workplace / "runs" / Path(words[1]).stem
    assert found_below(folder) == described(texts("text")[0])


def found_below(folder):
    """Paths in a run folder without locks, the other arm and what is inside of checkpoints, report and store."""
    paths = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.name != ".lock"}
    inside = re.compile(r"aegpo(/|$)|report/.|.base/.|.*/checkpoints/[^/]+/.")
    return {STEP.sub("N", path) for path in paths if not inside.match(path)}


def described(tree):
    """The paths of an indented tree, below its first line."""
    paths, parents = set(), []
    for line in tree.splitlines()[1:]:
        depth = (len(line) - len(line.lstrip())) // 2 - 1
        parents[depth:] = [line.split()[0].rstrip("/")]
        whole = "/".join(parents)
        paths |= {STEP.sub("N", whole)} | {"/".join(parents[: i + 1]) for i in range(depth)}
    return paths
