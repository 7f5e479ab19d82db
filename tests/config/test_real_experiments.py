"""The experiments for real models, end to end: two steps with small pipelines and rewards in place of the published."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from test_experiments import FOLDER
from torch import nn
from typer.testing import CliRunner

from aegpo.commands.cli import app
from aegpo.config.loading import load_experiment_file
from aegpo.errors import AegpoError
from aegpo.plugin.manager import load_registries, plugin_manager
from aegpo.prompts.lists import read_prompts
from aegpo.runs.checkpoints import load_latest

KINDS = {
    "sd35_aegpo": "sd3",
    "sd35_flow_grpo": "sd3",
    "flux_aegpo": "flux",
    "flux_dance_grpo": "flux",
    "sdxl_aegpo": "sdxl",
    "sd15_ddpo": "sd",
}
TRAIN = ["a red circle", "two blue squares", "a green cube on the left", "four purple circles"]
HELD_OUT = ["a blue circle", "two red squares"]
SMALL = {  # sizes alone: every part and every other number is the file's
    "training_steps": 2,
    "seeds": "[0]",
    "device": "cpu",
    "precision": "float32",
    "model.dtype": "float32",
    "model.height": 16,
    "model.width": 16,
    "rollouts.prompts_per_step": 2,
    "rollouts.rollouts_per_step": 24,
    "rollouts.denoising_steps": 6,
    "rollouts.micro_batch": 64,
    "optimizer.rollouts_per_update": 12,
    "optimizer.micro_batch": 64,
    "evaluation.denoising_steps": 3,
}
ARMS = dict.fromkeys(("sd35_flow_grpo", "sdxl_aegpo", "sd15_ddpo"), ("main",))
ARMS |= {
    "sd35_aegpo": ("grpo", "aegpo", "control"),
    "flux_aegpo": ("aegpo", "lora"),
    "flux_dance_grpo": ("dance", "lora"),
}
each_experiment = pytest.mark.parametrize("name", list(KINDS))


def opened(name):
    return load_experiment_file(FOLDER / f"{name}.yaml", load_registries(plugin_manager()))


@pytest.fixture(scope="module")
def scorers(tmp_path_factory) -> dict[str, dict[str, str]]:
    """Fields that put a small checkpoint in the place of the published one, by kind of reward."""
    from rewards import small_rewards

    root = tmp_path_factory.mktemp("rewards")
    clip, hps = str(small_rewards.write_clip(root / "clip")), small_rewards.write_tokenizer(root / "hps")
    torch.save({"state_dict": small_rewards.open_clip(518).state_dict()}, hps / "HPS_v2.1_compressed.pt")
    head = root / "aesthetic-model.pth"
    torch.save(nn.ModuleDict({"layers": nn.Sequential(nn.Linear(24, 1))}).state_dict(), head)
    blip = write_image_reward(root / "image-reward")
    return {
        "clip": {"path": clip},
        "pickscore": {"path": clip, "tokenizer": clip},
        "hpsv2": {"path": str(hps), "tokenizer": str(hps)},
        "aesthetic": {"path": str(head), "clip": clip},
        "image-reward": {"path": blip, "tokenizer": blip},
    }


def write_image_reward(folder: Path) -> str:
    from rewards.test_image_reward import WORDS, ImageReward
    from transformers import BertTokenizer

    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    BertTokenizer(vocab={piece: index for index, piece in enumerate(pieces)}).save_pretrained(folder)
    torch.save(ImageReward(vocabulary=18).state_dict(), folder / "ImageReward.pt")
    return str(folder)


def replacements(name, pipeline, scorers, folder: Path) -> list[str]:
    """The `--set` options that put small things in the place of published ones."""
    changes = SMALL | {"model.path": pipeline}
    for split, texts in (("train", TRAIN), ("evaluation", HELD_OUT)):
        path = folder / f"{split}.txt"
        path.write_text("\n".join(texts))
        changes[f"prompts.{split}"] = path
    experiment = next(iter(opened(name).arms.values()))
    for place, specs in (("rewards", experiment.rewards), ("evaluation.rewards", experiment.evaluation.rewards)):
        for index, spec in enumerate(specs):
            changes |= {f"{place}.{index}.{key}": value for key, value in scorers[spec.kind].items()}
    return [text for key, value in changes.items() for text in ("--set", f"{key}={value}")]


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "arm"), [(name, arm) for name, arms in ARMS.items() for arm in arms])
def test_two_steps_of_every_arm_on_small_pipelines(name, arm, pipeline_folders, scorers, tmp_path):
    changes = replacements(name, pipeline_folders[KINDS[name]], scorers, tmp_path)
    command = ["run", str(FOLDER / f"{name}.yaml"), "--arm", arm, "--out", str(tmp_path / "runs"), *changes]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    experiment, run = opened(name).arms[arm], tmp_path / "runs" / name / arm / "seed-0"
    steps = rows(run / "metrics.jsonl")
    assert [row["step"] for row in steps] == [1, 2]
    for row in (row["metrics"] for row in steps):
        assert all(math.isfinite(value) for value in row.values())
        assert row["reward_std"] > 0
        assert row["grad_norm"] > 0
    scored = {label for row in rows(run / "evaluations.jsonl") for label in row["scores"]}
    assert scored == {spec.label for spec in (*experiment.rewards, *experiment.evaluation.rewards)}
    if experiment.policy.train == "lora":
        learned = {key: w for key, w in load_latest(run / "checkpoints").tensors.items() if "lora_B" in key}
        assert any(bool(weight.any()) for weight in learned.values())  # lora_B begins at zero


@each_experiment
def test_without_the_prompts_the_error_says_how_to_get_them_or_to_give_others(name):
    pytest.importorskip("datasets")
    for experiment in opened(name).arms.values():
        with pytest.raises(AegpoError, match=r"ymhao/HPDv2.*cannot be loaded.*or give a file of prompts instead"):
            read_prompts(experiment, "train")


@each_experiment
def test_the_header_says_what_hardware_it_needs_and_that_it_was_not_run(name):
    text = (FOLDER / f"{name}.yaml").read_text().partition("\nname:")[0]
    for said in ("Deviates:", "Hardware, by arithmetic", "--set prompts.train=", "Not run on published weights"):
        assert said in text


@each_experiment
def test_every_arm_is_among_those_that_are_run(name):
    assert tuple(opened(name).arms) == ARMS[name]


def test_aegpo_has_the_papers_numbers():
    for experiment in opened("flux_aegpo").arms.values():
        assert (experiment.allocator.low, experiment.allocator.high, experiment.selector.top_k) == (8, 16, 4)
        assert (experiment.model.height, experiment.model.width, experiment.rollouts.denoising_steps) == (720, 720, 20)
        assert (experiment.sampler.kind, experiment.sampler.eta) == ("dance-sde", 0.3)
        assert [(reward.kind, reward.version) for reward in experiment.rewards] == [("hpsv2", "v2.1")]
    assert opened("flux_aegpo").arms["aegpo"].optimizer.learning_rate == 1e-5
