"""Plugins: found, blocked, blamed; and the guide that teaches writing one."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from repository import ROOT

from aegpo import testing
from aegpo.config.loading import load_experiment_file
from aegpo.core import hookspecs
from aegpo.core.parts import PART_AXES
from aegpo.core.records import Prompt, RunInfo, StepReport
from aegpo.errors import PluginError, SpecError
from aegpo.plugin.manager import distributions, load_registries, plugin_manager
from aegpo.train.engine import Engine

GUIDE = ROOT / "plugins" / "README.md"
GOOD = '''
from typing import Literal
import aegpo

class Constant(aegpo.RewardSpec):
    """The same score for everything."""
    kind: Literal["{kind}"] = "{kind}"

    def score(self, images, prompts):
        return images.new_zeros(len(images))

@aegpo.hookimpl
def aegpo_register_rewards(registry):
    registry.add(Constant)
'''


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder on the path with nothing installed but what a test installs there."""
    monkeypatch.delenv("AEGPO_BLOCK_PLUGINS", raising=False)
    installed = {entry.dist.name for entry in importlib.metadata.entry_points(group="aegpo")}
    if installed:
        monkeypatch.setenv("AEGPO_BLOCK_PLUGINS", ",".join(installed))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def install(site: Path, distribution: str, entry: str, source: str, group: str = "aegpo") -> str:
    """What pip would leave of a distribution with one module, and the module's name."""
    module = distribution.replace("-", "_")
    (site / f"{module}.py").write_text(source)
    info = site / f"{module}-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{entry} = {module}\n")
    return module


def block(monkeypatch, *names: str) -> None:
    before = os.environ.get("AEGPO_BLOCK_PLUGINS", "")
    monkeypatch.setenv("AEGPO_BLOCK_PLUGINS", ",".join([*filter(None, [before]), *names]))


def refusal(*modules: str) -> str:
    with pytest.raises(PluginError) as caught:
        load_registries(plugin_manager(modules))
    return str(caught.value)


# --- what is loaded --------------------------------------------------------------------------------------------------


def test_built_ins_register_through_the_same_hooks(site):
    registries = load_registries(plugin_manager())
    assert [registry.axis for registry in registries] == list(PART_AXES)
    assert all(registry.names for registry in registries)
    assert {entry.source for registry in registries for entry in registry} == {"aegpo"}


def test_every_manager_is_a_fresh_one(site):
    first, second = plugin_manager(), plugin_manager()
    first.register(object(), "only here")
    assert second.get_plugin("only here") is None


def test_an_installed_distribution_is_found_and_named(site):
    install(site, "aegpo-alpha", "alpha", GOOD.format(kind="one"))
    manager = plugin_manager()
    entries = {entry.name: entry for entry in load_registries(manager).rewards}
    assert entries["one"].source == "aegpo-alpha"
    assert entries["scene"].source == "aegpo"
    assert distributions(manager) == (("aegpo-alpha", "1.2"),)


def test_entry_points_of_other_groups_are_left_alone(site):
    install(site, "aegpo-beta", "beta", "raise RuntimeError('imported')", group="aegpo_other")
    assert distributions(plugin_manager()) == ()


def test_a_module_on_the_command_line_is_loaded_but_is_no_distribution(site):
    (site / "gamma_plugin.py").write_text(GOOD.format(kind="two"))
    manager = plugin_manager(["gamma_plugin"])
    entries = {entry.name: entry for entry in load_registries(manager).rewards}
    assert entries["two"].source == "gamma_plugin"
    assert distributions(manager) == ()


def test_a_file_on_the_command_line_is_loaded(site, monkeypatch):
    (site / "sub").mkdir()
    (site / "sub" / "delta.py").write_text(GOOD.format(kind="three"))
    assert "three" in load_registries(plugin_manager(["sub/delta.py"])).rewards.names


def test_a_module_that_a_distribution_brings_already_counts_once(site):
    module = install(site, "aegpo-epsilon", "epsilon", GOOD.format(kind="four"))
    assert load_registries(plugin_manager([module])).rewards.names.count("four") == 1


@pytest.mark.parametrize("name", ["zeta", "aegpo-zeta", "aegpo_zeta", "AEGPO-Zeta"])
def test_a_plugin_is_blocked_by_entry_point_distribution_or_module(site, monkeypatch, name):
    install(site, "aegpo-zeta", "zeta", "raise RuntimeError('imported')")
    block(monkeypatch, f" {name} ")
    manager = plugin_manager()
    assert distributions(manager) == ()


# --- what is refused -------------------------------------------------------------------------------------------------


def test_a_block_name_that_matches_nothing_is_refused(site, monkeypatch):
    install(site, "aegpo-eta", "eta", GOOD.format(kind="five"))
    block(monkeypatch, "aegpo-etta")
    assert refusal() == (
        "AEGPO_BLOCK_PLUGINS names 'aegpo-etta', but no plugin is called that; did you mean 'aegpo-eta'?"
    )


def test_an_import_that_fails_names_the_distribution_and_the_way_out(site):
    install(site, "aegpo-theta", "theta", "import no_such_library")
    assert refusal() == (
        "plugin 'theta' of distribution 'aegpo-theta' cannot be imported: ModuleNotFoundError: "
        "No module named 'no_such_library'; mend it, or leave it out with AEGPO_BLOCK_PLUGINS=aegpo-theta"
    )


def test_a_file_named_as_a_module_is_recognised(site):
    sys.path.remove(str(site))
    (site / "iota.py").write_text(GOOD.format(kind="six"))
    assert refusal("iota") == (
        "plugin module 'iota' cannot be imported: ModuleNotFoundError: No module named 'iota'; "
        "give its path, --plugin iota.py, or leave it out with AEGPO_BLOCK_PLUGINS=iota"
    )


def test_a_file_that_does_not_exist_is_named(site):
    assert "FileNotFoundError: no file 'kappa.py'" in refusal("kappa.py")


def hook(name: str, arguments: str = "registry", mark: str = "@aegpo.hookimpl", body: str = "pass") -> str:
    return f"import aegpo\n\n{mark}\ndef {name}({arguments}):\n    {body}\n"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            hook("aegpo_register_reward"),
            "plugin 'x' of distribution 'aegpo-x' defines 'aegpo_register_reward', which is no hook; "
            "did you mean 'aegpo_register_rewards'?",
        ),
        (
            hook("aegpo_on_step_ends", "report", mark=""),
            "plugin 'x' of distribution 'aegpo-x' defines 'aegpo_on_step_ends', which is no hook; "
            "did you mean 'aegpo_on_step_end'?",
        ),
        (
            hook("aegpo_on_step_end", "report", mark=""),
            "plugin 'x' of distribution 'aegpo-x' defines 'aegpo_on_step_end' without the mark @aegpo.hookimpl, so it "
            "would never run",
        ),
        ("x = 1", "plugin 'x' of distribution 'aegpo-x' implements no hook; known: aegpo_on_checkpoint, "),
        (
            hook("aegpo_on_step_end", "run, reprot"),
            "plugin 'x' of distribution 'aegpo-x' has a hook that does not fit: ",
        ),
        (
            hook("aegpo_register_trees", mark="@aegpo.hookimpl(wrapper=True)", body="return (yield)"),
            "plugin 'x' of distribution 'aegpo-x' wraps a registration hook, which only adds; drop 'wrapper', or leave "
            "it out with AEGPO_BLOCK_PLUGINS=aegpo-x",
        ),
        (
            hook("aegpo_register_trees", body="1 / 0"),
            "plugin 'x' of distribution 'aegpo-x' fails to register its trees: ZeroDivisionError: division by zero; "
            "mend it, or leave it out with AEGPO_BLOCK_PLUGINS=aegpo-x",
        ),
        (
            GOOD.format(kind="scene"),
            "aegpo-x registers rewards 'scene', a name aegpo has taken; rename it, or leave the plugin out with "
            "AEGPO_BLOCK_PLUGINS=aegpo-x",
        ),
    ],
)
def test_a_wrong_hook_names_the_distribution(site, monkeypatch, source, message):
    install(site, "aegpo-x", "x", source)
    monkeypatch.delitem(sys.modules, "aegpo_x", raising=False)
    assert refusal().startswith(message)


def test_two_plugins_of_one_name_are_refused(site):
    install(site, "aegpo-lambda", "same", GOOD.format(kind="seven"))
    install(site, "aegpo-mu", "same", GOOD.format(kind="eight"))
    assert refusal() == (
        "plugin 'same' of distribution 'aegpo-mu' has the name of a plugin that is loaded already; rename its entry "
        "point, or leave it out with AEGPO_BLOCK_PLUGINS=aegpo-mu"
    )


# --- the guide -------------------------------------------------------------------------------------------------------


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", GUIDE.read_text(), flags=re.DOTALL)


def test_the_hook_reference_is_current_and_complete():
    done = subprocess.run([sys.executable, ROOT / "tools" / "hook_reference.py", "--check"], check=False)
    assert done.returncode == 0, "run python tools/hook_reference.py"
    for name, function in vars(hookspecs).items():
        if name.startswith("aegpo_"):
            assert function.__doc__
            assert f"`{name}(" in GUIDE.read_text()


def test_the_reference_is_not_current_when_a_hook_is_missing(tmp_path):
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        import hook_reference
    finally:
        sys.path.pop(0)
    text = GUIDE.read_text()
    cut = re.sub(r"\| `aegpo_on_run_end.*\n", "", text)
    assert cut != text
    assert hook_reference.updated(cut) == text


def test_the_guides_reward_and_its_test_work_as_printed(site):
    reward, check, *_ = blocks("python")
    (site / "my_reward.py").write_text(reward)
    (site / "test_my_reward.py").write_text(check)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_my_reward.py"],
        cwd=site,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "1 passed" in done.stdout, done.stdout + done.stderr


def test_the_guides_commands_work_as_printed(site, tiny_weights):
    (site / "my_reward.py").write_text(blocks("python")[0])
    (site / "experiments").symlink_to(ROOT / "experiments")
    less = f"--arm grpo --set training_steps=1 --set model.weights={tiny_weights} --no-report".split()
    lines = [line.split() for line in blocks("sh")[0].splitlines()]
    assert [line[1] for line in lines] == ["plugins", "check", "run"]
    for line in lines:
        extra = less if line[1] == "run" else []
        done = subprocess.run(
            [sys.executable, "-m", *line, *extra], cwd=site, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
    (metrics,) = site.glob("runs/*/grpo/seed-*/metrics.jsonl")
    assert "redness" in metrics.read_text()


def test_the_guides_distribution_builds_and_is_found(site):
    project = site / "project"
    project.mkdir()
    (project / "my_reward.py").write_text(blocks("python")[0])
    (project / "pyproject.toml").write_text(blocks("toml")[0])
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel"]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = (project / "dist").glob("*.whl")
    sys.path.insert(0, str(wheel))
    try:
        manager = plugin_manager()
        assert "redness" in load_registries(manager).rewards.names
        assert distributions(manager) == (("aegpo-redness", "0.1.0"),)
    finally:
        sys.path.remove(str(wheel))
        sys.modules.pop("my_reward", None)


def test_the_guides_observer_is_told_of_steps(site, capsys):
    (site / "observer.py").write_text(blocks("python")[2])
    run = RunInfo(arm="grpo", seed=1, folder=site, first_step=0, training_steps=2)
    counts, selected = np.array([2]), np.ones((1, 3), dtype=bool)
    report = StepReport(2, {"reward": 0.5}, (Prompt(0, "x"),), counts, selected, None, None, {})
    plugin_manager(["observer.py"]).hook.aegpo_on_step_end(run=run, report=report)
    assert capsys.readouterr().out == "grpo 1 2 {'reward': 0.5}\n"


RULES = """
training_steps: 2
model: shapes
rewards: [palette]
rollouts: {prompts_per_step: 2, rollouts_per_step: 8, denoising_steps: 6}
allocator: uniform
selector: {kind: quietest, top_k: 2}
tree: pairs
sampler: flow-sde
advantage: group
objective: {kind: clipped, clip: 3.8e-3}
"""


def test_the_guides_rules_conform_and_say_what_they_find_wrong(site):
    (site / "my_rules.py").write_text(blocks("python")[3])
    manager = plugin_manager(["my_rules"])
    registries = load_registries(manager)
    for axis, name, check in (
        ("selectors", "quietest", testing.check_selector),
        ("trees", "pairs", testing.check_tree),
        ("objectives", "weighted", testing.check_objective),
    ):
        registry = next(each for each in registries if each.axis == axis)
        check(next(entry.spec for entry in registry if entry.name == name)())
    (site / "x.yaml").write_text("name: x" + RULES)
    load = partial(load_experiment_file, site / "x.yaml", registries)
    file = load()
    assert file.warnings == ()
    report = Engine.build(file.arms["main"]).step(1)
    assert report.metrics["trained_edges"] == 8 * 2
    (warning,) = load(["objective=weighted", "tree={kind: independent, noise: none}"]).warnings
    assert "x.yaml:7:11: selector: objective 'weighted' has noise of its own" in warning
    with pytest.raises(SpecError, match=r"selector: 6 steps cannot be chosen from 5; lower 'top_k'"):
        load(["selector.top_k=6"])
    with pytest.raises(
        SpecError, match=r"tree: tree 'pairs' needs an even number of rollouts of each prompt, not \[3, 3\]"
    ):
        load(["rollouts.rollouts_per_step=6"])


def test_the_guide_names_every_check_and_every_axis():
    text = GUIDE.read_text()
    checks = {name for name in vars(testing) if name.startswith("check_")} - {"check_spec"}
    assert checks <= set(re.findall(r"check_\w+", text))
    assert {f"`{axis}`" for axis in PART_AXES} <= set(re.findall(r"`\w+`", text))


@pytest.mark.parametrize(("name", "module"), [("jpeg", "aegpo_jpeg"), ("qwen-image", "aegpo_qwen_image")])
def test_a_shipped_plugin_declares_its_entry_point(name, module):
    project = tomllib.loads((ROOT / "plugins" / f"aegpo-{name}" / "pyproject.toml").read_text())["project"]
    assert project["entry-points"] == {"aegpo": {name: module}}
