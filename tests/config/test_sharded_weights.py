"""What goes with no sharded weights is refused where the file says it, with what would be right."""

from __future__ import annotations

import json
import re

import pytest

from aegpo.config.loading import load_experiment_file
from aegpo.errors import SpecError
from aegpo.plugin.manager import load_registries, plugin_manager

SHARDED = "parallel.weights=sharded"


@pytest.fixture(scope="module")
def registries():
    return load_registries(plugin_manager())


@pytest.fixture
def load(tmp_path, registries):
    path = tmp_path / "x.yaml"
    path.write_text(json.dumps({"model": "shapes", "rewards": ["palette"]}))
    return lambda *overrides: load_experiment_file(path, registries, overrides)


@pytest.mark.parametrize(
    ("setting", "key", "message"),
    [
        ("precision=float16", "precision", "write 'precision: bfloat16'"),
        ("optimizer.moments=8bit", "optimizer.moments", "write 'moments: float32'"),
        ("optimizer.retain=2.5", "optimizer.retain", "2.5 GiB of graphs go with no 'parallel.weights: sharded'"),
    ],
)
def test_settings_that_need_whole_weights_are_refused_with_sharded_ones(load, setting, key, message):
    with pytest.raises(SpecError) as caught:
        load(SHARDED, setting)
    text = str(caught.value)
    assert key in text
    assert message in text
    assert "'parallel.weights: whole'" in text


@pytest.mark.parametrize("weights", ["auto", "whole"])
def test_otherwise_they_are_not(load, weights):
    assert load(f"parallel.weights={weights}", "optimizer.retain=2.5")


def test_graphs_of_sampling_are_never_kept_of_sharded_weights(load):
    def retained(*overrides):
        (experiment,) = load(*overrides).arms.values()
        return experiment.retained_bytes

    assert retained() is None
    assert retained(SHARDED) == 0
    assert not load(SHARDED).warnings


def test_a_base_that_waits_in_main_memory_is_refused_with_sharded_weights(pipeline_folders, tmp_path, registries):
    (tmp_path / "a.txt").write_text("a red circle\n")
    (tmp_path / "b.txt").write_text("a blue circle\n")
    model = {"kind": "flux", "path": str(pipeline_folders["flux"]), "height": 16, "width": 16, "offload_base": True}
    prompts = {"train": str(tmp_path / "a.txt"), "evaluation": str(tmp_path / "b.txt")}
    parts = {"rewards": ["palette"], "rollouts": {"prompts_per_step": 1}}
    path = tmp_path / "flux.yaml"
    path.write_text(json.dumps({"model": model, "prompts": prompts, **parts}))
    load_experiment_file(path, registries, ())
    with pytest.raises(SpecError, match=re.escape("'offload_base: true' goes with no 'parallel.weights: sharded'")):
        load_experiment_file(path, registries, (SHARDED,))
    load_experiment_file(path, registries, (SHARDED, "policy.train=lora"))  # warned of, for it has no effect
