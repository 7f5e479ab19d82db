"""The guide that teaches writing a plugin: everything in it works as printed."""

from __future__ import annotations

import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from repository import ROOT

from aegpo import testing
from aegpo.config.loading import load_experiment_file
from aegpo.core import hookspecs
from aegpo.core.records import Prompt
from aegpo.core.registries import PART_AXES
from aegpo.core.reports import RunInfo, StepReport
from aegpo.errors import SpecError
from aegpo.plugin.manager import distributions, load_registries, plugin_manager
from aegpo.train.engine import Engine

GUIDE = ROOT / "plugins" / "README.md"


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


@pytest.mark.slow
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


@pytest.mark.slow
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
    report = StepReport(2, {"reward": 0.5}, (Prompt(0, "x"),), counts, selected, {}, {})
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


def test_the_guides_signal_splits_the_prompts(site):
    (site / "my_signal.py").write_text(blocks("python")[3])
    (site / "x.yaml").write_text(
        "name: x\nmodel: shapes\nrewards: [palette]\nprompts: {train_count: 8, evaluation_count: 2}\n"
        "rollouts: {prompts_per_step: 2, rollouts_per_step: 12, denoising_steps: 3}\n"
        "allocator: {kind: median-split, signal: words, low: 4, high: 8, warmup: 0}\n"
    )
    registries = load_registries(plugin_manager(["my_signal"]))
    engine = Engine.build(load_experiment_file(Path("x.yaml"), registries).experiment("main", 0))
    report = engine.step(1)
    words = [len(prompt.text.split()) for prompt in report.prompts]
    assert report.signals["words"].values.tolist() == words
    assert report.metrics["signal_forwards"] == 0
    assert report.counts.tolist() == ([4, 8] if words[0] < words[1] else [8, 4] if words[0] > words[1] else [6, 6])


def test_the_guides_rules_conform_and_say_what_they_find_wrong(site):
    (site / "my_rules.py").write_text(blocks("python")[4])
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


def test_the_guides_reward_on_metadata_conforms_and_names_the_line_of_a_prompt_without_it(site):
    (site / "my_light.py").write_text(blocks("python")[5])
    registries = load_registries(plugin_manager(["my_light"]))
    asked = [Prompt(number, "a cat", {"light": number / 4}) for number in range(4)]
    testing.check_reward(registries.rewards.get("light")(), asked)
    (site / "p.jsonl").write_text('{"prompt": "a cat", "light": 0.5}\n{"prompt": "a dog"}\n')
    (site / "x.yaml").write_text(
        "name: x\nmodel: shapes\nrewards: [light]\nprompts: {train: p.jsonl, train_count: 2}\n"
    )
    with pytest.raises(
        SpecError, match=r"p.jsonl, line 2: reward 'light' needs 'light', but this prompt has no metadata"
    ):
        load_experiment_file(site / "x.yaml", registries)


def test_the_guide_names_every_check_and_every_axis():
    text = GUIDE.read_text()
    checks = {name for name in vars(testing) if name.startswith("check_")} - {"check_spec"}
    assert checks <= set(re.findall(r"check_\w+", text))
    assert {f"`{axis}`" for axis in PART_AXES} <= set(re.findall(r"`\w+`", text))
