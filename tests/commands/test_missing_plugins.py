"""A run is painted with and exported where the plugins of its method are not installed; its model's must be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import aegpo

from aegpo.plugin.manager import load_registries, plugin_manager
from aegpo.runs.opening import find_run

PLUGIN = """
from typing import Literal

import numpy as np

import aegpo


class Blue(aegpo.RewardSpec):
    'How blue an image is.'

    kind: Literal["blue"] = "blue"

    def score(self, images, prompts):
        return images[:, 2].mean(dim=(1, 2))


class Even(aegpo.AllocatorSpec):
    'The same for all.'

    kind: Literal["even"] = "even"

    def allocate(self, signals, budget, rng):
        return np.full(signals.num_prompts, budget // signals.num_prompts)


class Quiet(aegpo.TrackerSpec):
    'Says nothing.'

    kind: Literal["quiet"] = "quiet"

    def build(self, folder):
        return Watcher()


class Watcher:
    @aegpo.hookimpl
    def aegpo_on_step_end(self, run, report):
        pass


@aegpo.hookimpl
def aegpo_register_rewards(registry):
    registry.add(Blue)


@aegpo.hookimpl
def aegpo_register_allocators(registry):
    registry.add(Even)


@aegpo.hookimpl
def aegpo_register_trackers(registry):
    registry.add(Quiet)
"""
EXPERIMENT = """
name: blue
training_steps: 1
device: cpu
model: shapes
prompts: {train_count: 4, evaluation_count: 2}
rollouts: {prompts_per_step: 2, rollouts_per_step: 4, denoising_steps: 3}
rewards: [blue]
evaluation: {rewards: [palette, {kind: blue, name: again}]}
allocator: even
trackers: [jsonl]
"""
PROMPT = ("--prompt", "two red circles on a green background")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("missing")


@pytest.fixture(autouse=True)
def run(folder, monkeypatch) -> str:
    """A run that was trained with a plugin that is not loaded any more."""
    monkeypatch.chdir(folder)
    if not Path("runs").exists():
        Path("blue.py").write_text(PLUGIN)
        Path("blue.yaml").write_text(EXPERIMENT)
        done = aegpo("run", "blue.yaml", "--no-report", "--plugin", "blue.py")
        assert done.code == 0, done.stderr
    return "runs/blue/main/seed-0"


def test_what_is_painted_without_the_plugin_is_what_is_painted_with_it(run):
    without = aegpo("sample", run, *PROMPT, "--out", "without")
    assert without.code == 0, without.stderr
    said = "note: allocator 'even', reward 'blue' are not installed, and not needed for what is painted\n"
    assert said in without.stderr
    beside = aegpo("sample", run, *PROMPT, "--out", "with", "--plugin", "blue.py")
    assert beside.code == 0, beside.stderr
    assert "not installed" not in beside.stderr
    for name in ("base", "policy"):
        assert Path("with", name, "00000.png").read_bytes() == Path("without", name, "00000.png").read_bytes()


def test_what_is_known_of_the_method_stays_as_it_was(run):
    found = find_run(Path(run), load_registries(plugin_manager()), only_policy=True)
    assert [each.kind for each in found.experiment.evaluation.rewards] == ["palette"]
    assert (found.experiment.allocator.kind, found.experiment.objective.kind) == ("uniform", "clipped")
    assert found.missing == ("allocator 'even'", "reward 'blue'")


@pytest.mark.parametrize("words", [("evaluate",), ("run",), ("profile-entropy",)])
def test_who_trains_scores_or_measures_needs_the_plugin(run, words):
    done = aegpo(*words, run)
    assert done.code == 2
    assert "unknown kind 'even'" in done.stderr
    assert "give the missing plugin with --plugin" in done.stderr


def test_a_model_that_is_not_installed_is_refused(run):
    manifest = Path(run, "manifest.json")
    before = manifest.read_text()
    changed = json.loads(before)
    changed["experiment"]["model"]["kind"] = "shapez"
    del changed["crc32"]
    manifest.write_text(json.dumps(changed))
    done = aegpo("sample", run, *PROMPT, "--out", "none")
    manifest.write_text(before)
    assert done.code == 2
    assert "unknown kind 'shapez'" in done.stderr
    assert not Path("none").exists()
