"""An experiment that names a model and a reward is GRPO: every other part has a default."""

from __future__ import annotations

import pytest

from aegpo.config.loading import load_experiment_file, parse_experiment
from aegpo.core.experiment_type import DEFAULTS
from aegpo.plugin.manager import load_registries, plugin_manager

WRITTEN_OUT = """model: shapes
rewards: [palette]
allocator: uniform
selector: uniform
tree: independent
sampler: flow-sde
advantage: group
objective: clipped
"""


@pytest.fixture(scope="module")
def registries():
    return load_registries(plugin_manager())


def load(folder, text, registries):
    path = folder / "x.yaml"
    path.write_text(text)
    return load_experiment_file(path, registries)


def test_a_model_and_a_reward_are_an_experiment_which_is_grpo(tmp_path, registries):
    short = load(tmp_path, "model: shapes\nrewards: [palette]\n", registries)
    assert short.warnings == ()
    whole = load(tmp_path, WRITTEN_OUT, registries)
    assert short.arms["main"].model_dump(mode="json") == whole.arms["main"].model_dump(mode="json")
    assert {axis: part.kind for axis, part in short.arms["main"].algorithm().items()} == DEFAULTS


def test_an_arm_may_replace_a_default_and_set_its_fields(tmp_path, registries):
    text = "model: shapes\nrewards: [palette]\narms:\n  one: {allocator: {kind: entropy, low: 8, high: 16}}\n"
    allocator = load(tmp_path, text, registries).arms["one"].allocator
    assert (allocator.kind, allocator.low) == ("entropy", 8)


def test_a_manifest_of_defaults_reads_back_equal(tmp_path, registries):
    experiment = load(tmp_path, "model: shapes\nrewards: [palette]\n", registries).arms["main"]
    dumped = experiment.model_dump(mode="json")
    assert parse_experiment(dumped, registries).model_dump(mode="json") == dumped
