"""What people reported of settings that do nothing, of seeds, of comparisons, and of files for other programs.

Settings: huggingface/peft 1959, bghira/SimpleTuner 766, mcmonkeyprojects/SwarmUI 204. Seeds: rgthree/rgthree-comfy 90,
pytorch/torchtitan 746. Comparisons: CodeGoat24/Pref-GRPO 18, NVIDIA-NeMo/RL PR 4158. Files: huggingface/diffusers 6087,
Comfy-Org/ComfyUI 12191.
"""

from __future__ import annotations

import json
import warnings

import pytest
from safetensors import safe_open

LORA = {"train": "lora", "rank": 2, "alpha": 2}
STILL = '''\
"""Rewards of one constant each."""

from typing import Literal

import torch

import aegpo


class Still(aegpo.RewardSpec):
    """A constant."""

    kind: Literal["still"] = "still"
    value: float = 0.1

    def score(self, images, prompts):
        return torch.full((len(images),), self.value)


class First(aegpo.RewardSpec):
    """1 for the first image of each prompt of a call, 0 for the others: it means nothing for an image alone."""

    kind: Literal["first"] = "first"
    group_wise = True

    def score(self, images, prompts):
        texts = [prompt.text for prompt in prompts]
        return torch.tensor([float(texts.index(text) == row) for row, text in enumerate(texts)])


@aegpo.hookimpl
def aegpo_register_rewards(registry):
    registry.add(Still)
    registry.add(First)
'''


def rows_of(folder, name):
    """The rows of every such record below a folder."""
    texts = [path.read_text() for path in sorted(folder.rglob(name))]
    return [json.loads(line) for text in texts for line in text.splitlines()]


@pytest.fixture(scope="session")
def sd3(tmp_path_factory):
    from pipelines import write_sd3

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return write_sd3(tmp_path_factory.mktemp("sd3") / "sd3")


@pytest.fixture
def sd3_run(warm, write_experiment, sd3, tmp_path):
    """A run of a small pipeline with these adapters, which ended well: its folder."""

    def run(**policy):
        (tmp_path / "t.txt").write_text("a red circle\ntwo blue squares\na green square\nfour purple circles\n")
        (tmp_path / "e.txt").write_text("a blue circle\ntwo red squares\n")
        path = write_experiment(
            model={"kind": "sd3", "path": str(sd3), "height": 24, "width": 24, "cache": str(tmp_path / "cache")},
            policy=LORA | policy,
            prompts={"train": "t.txt", "train_count": 4, "evaluation": "e.txt", "evaluation_count": 2},
            training_steps=1,
        )
        ended = warm(["run", path, "--out", "out", "--no-report"], tmp_path)
        assert ended.code == 0, ended.out
        return next((tmp_path / "out").rglob("manifest.json")).parent

    return run


# --- settings that do nothing ----------------------------------------------------------------------------------------


def test_misspelt_lora_target(warm, write_experiment, tmp_path):
    path = write_experiment(policy=LORA | {"targets": ["to_q", "to_kk"]})
    ended = warm(["run", path, "--out", "out"], tmp_path)
    assert (ended.code, ended.traceback) == (2, False)
    assert "matches 'targets' to_kk; did you mean 'to_k'?" in ended.error


def test_misspelt_layer_of_the_entropy(warm, write_experiment, tmp_path):
    signals = {"entropy": {"layers": ["transformer_blocks.0.*", "transformer_blocks.9.*"]}}
    path = write_experiment(signals=signals, allocator={"kind": "entropy", "low": 2, "high": 6})
    ended = warm(["run", path, "--out", "out"], tmp_path)
    assert (ended.code, ended.traceback) == (2, False)
    assert "no layer matches 'transformer_blocks.9.*'; layers are transformer_blocks.0.attn" in ended.error


@pytest.mark.parametrize("command", ["check", "run"])
def test_what_has_no_effect_is_told(warm, write_experiment, tmp_path, command):
    path = write_experiment(policy={"targets": ["to_q"]}, optimizer={"momentum": 0.5}, training_steps=1)
    ended = warm([command, path, "--out", "out"], tmp_path)
    assert ended.code == 0, ended.out
    for name, where in (("policy.targets", "train: full"), ("optimizer.momentum", "kind: adamw")):
        assert f"{name}: has no effect under '{where}'; remove it" in ended.out


# --- seeds -----------------------------------------------------------------------------------------------------------


def test_negative_seed_of_the_profile(warm, write_experiment, tmp_path):
    ended = warm(["profile-entropy", write_experiment(), "--seed", "-1", "--out", "p"], tmp_path)
    assert (ended.code, ended.traceback) == (2, False)
    assert "Invalid value for '--seed'" in ended.out


@pytest.mark.parametrize("seed", [20250131120000, 2**63 - 1, 2**63, -1])
@pytest.mark.parametrize("place", ["entropy", "evaluation", "prompts", "the run"])
def test_seed_that_is_a_date(warm, write_experiment, tmp_path, place, seed):
    """Each seed of a file works up to what 64 bits hold, and is refused beyond, at its line."""
    sections = {
        "entropy": {"signals": {"entropy": {"seed": seed}}},
        "evaluation": {"evaluation": {"every": 2, "seed": seed}},
        "prompts": {"prompts": {"train_count": 12, "evaluation_count": 4, "seed": seed}},
        "the run": {"seeds": [seed]},
    }
    path = write_experiment(
        **{"allocator": {"kind": "entropy", "low": 2, "high": 6}, "training_steps": 2}, **sections[place]
    )
    ended = warm(["run", path, "--out", "out", "--no-report"], tmp_path)
    assert not ended.traceback, ended.out
    assert ended.code == (0 if 0 <= seed < 2**63 else 2), ended.out
    assert ended.code == 0 or "tiny.yaml:" in ended.error


# --- comparisons -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0.38, 0.7])
@pytest.mark.parametrize("advantage", ["group", "depth", "process", "running"])
def test_constant_rewards_leave_nothing_to_learn(warm, write_experiment, tmp_path, advantage, value):
    """Two rewards whose weighted sum rounds; the mean of 24 equal sums is not that sum."""
    (tmp_path / "still.py").write_text(STILL)
    one, other = {"value": value, "weight": 0.3, "name": "a"}, {"value": 0.1, "weight": 0.7, "name": "b"}
    path = write_experiment(
        rewards=[{"kind": "still"} | one, {"kind": "still"} | other],
        rollouts={"prompts_per_step": 2, "rollouts_per_step": 24, "denoising_steps": 4, "micro_batch": 24},
        optimizer={"drop_zero_credit": True},
        advantage=advantage,
        training_steps=2,
    )
    ended = warm(["run", path, "--plugin", "still.py", "--out", "out", "--no-report"], tmp_path)
    assert ended.code == 0, ended.out
    updated = [row["metrics"]["updated_edges"] for row in rows_of(tmp_path / "out", "metrics.jsonl")]
    assert updated == [0, 0]


def test_a_group_wise_reward_of_a_held_out_prompt_that_comes_twice(warm, write_experiment, tmp_path):
    """Each of the two is a group of two images, the policy's and the base's."""
    (tmp_path / "still.py").write_text(STILL)
    (tmp_path / "e.txt").write_text("a red circle\na red circle\na blue circle\n")
    path = write_experiment(
        prompts={"train_count": 12, "evaluation": "e.txt", "evaluation_count": 3, "shared": "drop"},
        evaluation={"every": 2, "images": 1, "rewards": ["first"]},
        training_steps=2,
    )
    ended = warm(["run", path, "--plugin", "still.py", "--out", "out", "--no-report"], tmp_path)
    assert ended.code == 0, ended.out
    for row in rows_of(tmp_path / "out", "evaluations.jsonl"):
        assert row["scores"]["first"] == [1.0, 1.0, 1.0]
        assert row["base_scores"]["first"] == [0.0, 0.0, 0.0]


# --- files for other programs ----------------------------------------------------------------------------------------


def test_lora_alpha_for_other_loaders(warm, sd3_run, tmp_path):
    """The exported file means the same to readers that know alpha and to those that take it for the rank.

    The first judgement asked for keys `.alpha`. They would make diffusers read the file as one of kohya's, with other
    names; the scale is in the weights instead, and alpha is the rank.
    """
    run = sd3_run(alpha=8)
    ended = warm(["export", run, "--to", "lora"], tmp_path)
    assert ended.code == 0, ended.out
    (path,) = (tmp_path / "lora").rglob("*.safetensors")
    with safe_open(path, "pt") as file:
        keys, config = list(file.keys()), json.loads(file.metadata()["lora_adapter_metadata"])
        ranks = {file.get_slice(key).get_shape()[0] for key in keys if "lora_A" in key}
    assert ranks == {config["transformer.r"]} == {config["transformer.lora_alpha"]} == {2}
    assert all("lora_A" in key or "lora_B" in key for key in keys)
