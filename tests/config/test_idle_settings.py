"""What was given and has no effect under the other settings is told, with its place and what would be right."""

from __future__ import annotations

from typing import ClassVar, Literal

import pytest
from worlds import BrightnessReward

from aegpo.config.loading import load_experiment_file
from aegpo.core.parts import RewardSpec
from aegpo.core.registry import Registry, Where
from aegpo.errors import PluginError
from aegpo.plugin.manager import load_registries, plugin_manager

FILE = """\
training_steps: 4
model: shapes
rewards: [palette]
rollouts: {prompts_per_step: 2, rollouts_per_step: 8, denoising_steps: 8}
objective: {kind: clipped, clip: 3.8e-3}
"""
JUDGE = "kind: vlm-judge, url: 'http://127.0.0.1:9/v1', model: m"
IDLE = {  # --set -> where, why, and what would be right
    "policy={rank: 4}": "policy.rank: has no effect under 'train: full'; remove it, or choose 'train' lora",
    "policy={alpha: 4}": "policy.alpha: has no effect under 'train: full'",
    "policy={targets: [to_q]}": "policy.targets: has no effect under 'train: full'",
    "signals={entropy: {rows: 8}}": "signals.entropy: has no effect: no part reads entropy or entropy-delta; remove it",
    "evaluation={rewards: [scene, {kind: hpsv2, weight: 2}]}": "evaluation.rewards.1.weight: has no effect: what only",
    "rewards=[{kind: hpsv2, backend: package, tokenizer: t}]": "rewards.0.tokenizer: has no effect under 'backend: ",
    f"rewards=[{{{JUDGE}, retries: 0, backoff: 2}}]": "rewards.0.backoff: has no effect under 'retries: 0'; remove it, "
    "or choose 'retries' other than 0",
    "advantage={kind: group, std: none, unbiased: false}": "advantage.unbiased: has no effect under 'std: none'; "
    "remove it, or choose 'std' other than none",
    "advantage={kind: group, best_of_scope: prompt}": "advantage.best_of_scope: has no effect under 'best_of: null'",
    "advantage={kind: gain, std: none, epsilon: 0.1}": "advantage.epsilon: has no effect under 'std: none'",
    "advantage={kind: depth, pruning_ratio: 0.3}": "advantage.pruning_ratio: has no effect under 'pruning: none'",
    "advantage={kind: running, buffer: 8}": "advantage: 'least' 16 is more than the 8 rewards of 'buffer'",
    "selector={kind: sliding-window, threshold: 4}": "selector.threshold: has no effect under 'strategy: progressive'; "
    "remove it, or choose 'strategy' exp-decay",
    "selector={kind: sliding-window, strategy: random, shift: 2}": "selector.shift: has no effect under 'strategy: ran",
    "selector={kind: sliding-window, least_interval: 4}": "selector.least_interval: has no effect under 'strategy: pro",
    "selector={kind: depth-pruned, interval: null, stop_depth: 4}": "selector.stop_depth: has no effect under 'inter",
    "objective={kind: clipped, kl_units: rate}": "objective.kl_units: has no effect under 'beta: 0.0'; remove it",
    "objective={kind: awm, clip: 4.0e-4, power: 0.5}": "objective.power: has no effect under 'weight: 1'; remove it",
    "allocator={kind: entropy, low: 3, high: 5, warmup: 4}": "allocator: 'warmup' 4 is all of the run's 4 training",
}
IN_EFFECT = (  # the same fields under settings that read them, or with their defaults
    "policy={train: lora, rank: 4, alpha: 4, targets: [to_q]}",
    "policy={rank: 32, targets: null}",
    "advantage={kind: group, std: none, unbiased: true}",
    "advantage={kind: group, best_of: 2, best_of_scope: prompt}",
    "selector={kind: sliding-window, strategy: exp-decay, threshold: 4}",
    "objective={kind: clipped, clip: 3.8e-3, beta: 0.1, kl_units: rate}",
    "rewards=[{kind: palette, weight: 2}]",
)


@pytest.fixture(scope="module")
def registries():
    return load_registries(plugin_manager())


@pytest.fixture
def load(tmp_path, registries):
    path = tmp_path / "x.yaml"
    path.write_text(FILE)
    return lambda *overrides: load_experiment_file(path, registries, overrides)


@pytest.mark.parametrize("setting", IDLE)
def test_a_setting_without_effect_is_told_with_its_place_and_what_would_be_right(load, setting):
    told = [warning for warning in load(setting).warnings if IDLE[setting] in warning]
    assert len(told) == 1, load(setting).warnings


@pytest.mark.parametrize("setting", IN_EFFECT)
def test_a_setting_with_an_effect_or_as_it_is_anyway_is_not(load, setting):
    assert load(setting).warnings == ()


def test_a_seed_of_captions_has_no_effect_on_files(load, tmp_path):
    for name, colour in (("train", "red"), ("evaluation", "blue")):
        (tmp_path / f"{name}.txt").write_text(f"a {colour} circle\na {colour} square\n")
    files = f"train: {tmp_path / 'train.txt'}, evaluation: {tmp_path / 'evaluation.txt'}"
    (warning,) = load(f"prompts={{{files}, train_count: 2, evaluation_count: 2, seed: 3}}").warnings
    assert "prompts.seed: has no effect: it draws captions of the model's, and both lists are files" in warning


def test_a_revision_of_a_folder_has_no_effect(load, tmp_path):
    (tmp_path / "ds").mkdir()
    (warning,) = load(f"prompts={{train: {{dataset: {tmp_path / 'ds'}, revision: v1}}}}").warnings
    assert "prompts.train.revision: has no effect: " in warning


def test_what_two_arms_set_and_one_reads_is_told_of_the_other(tmp_path, registries):
    path = tmp_path / "arms.yaml"
    path.write_text(f"{FILE}policy: {{rank: 4}}\narms: {{full: {{}}, lora: {{policy: {{train: lora}}}}}}\n")
    (warning,) = load_experiment_file(path, registries).warnings
    assert f"{path}:6:16: policy.rank: has no effect under 'train: full'" in warning
    assert "(in arm 'full')" in warning


class Muffled(BrightnessReward):
    """Names a field that it does not have."""

    kind: Literal["muffled"] = "muffled"
    read_where: ClassVar = {"loudness": Where("kind", ("muffled",))}


def test_a_part_that_names_a_field_it_does_not_have_is_refused_at_registration():
    with pytest.raises(PluginError, match="whose 'read_where' names no field of it: 'loudness'; known: "):
        Registry("rewards", RewardSpec).add(Muffled)
