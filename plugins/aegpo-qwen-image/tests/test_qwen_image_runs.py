"""The example experiment end to end: two steps with the small pipeline in place of the published one."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from small_qwen_image import their_images
from typer.testing import CliRunner

from aegpo.commands.cli import app
from aegpo.plugin.manager import load_registries, plugin_manager
from aegpo.prompts.lists import numbered
from aegpo.runs.checkpoints import load_latest
from aegpo.runs.opening import find_run
from aegpo.testing import load_arms
from aegpo.train.policy import Policy

EXAMPLE = Path(__file__).parents[1] / "qwen_image_aegpo.yaml"
ARMS = ("grpo", "aegpo", "control")
TRAIN = [  # sentences of the embedded world, whose rewards read them, of unequal length
    "a red circle on a green background",
    "two blue squares on a red background",
    "a green circle and a blue square on a yellow background",
    "four purple circles and a red square on a blue background",
]
HELD_OUT = ["a blue circle on a red background", "two red squares and a green circle on a yellow background"]
SMALL = {  # sizes, rewards and learning rate alone: every other part and number is the file's
    "training_steps": 2,
    "seeds": "[0]",
    "device": "cpu",
    "precision": "float32",
    "model.dtype": "float32",
    "model.height": 24,  # what the rewards of the embedded world read
    "model.width": 24,
    "rewards": "[palette]",
    "evaluation.rewards": "[scene]",
    "rollouts.prompts_per_step": 2,
    "rollouts.rollouts_per_step": 24,
    "rollouts.denoising_steps": 6,
    "rollouts.micro_batch": 64,
    "optimizer.rollouts_per_update": 12,
    "optimizer.micro_batch": 64,
    "optimizer.learning_rate": 0.03,
    "evaluation.denoising_steps": 3,
    "trackers": "[console, jsonl]",
}


def call(*words: object):
    return CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)


def changed(folder, tmp_path, **changes) -> list[str]:
    changes = SMALL | {"model.path": folder} | changes
    for split, texts in (("train", TRAIN), ("evaluation", HELD_OUT)):
        (tmp_path / f"{split}.txt").write_text("\n".join(texts))
        changes[f"prompts.{split}"] = tmp_path / f"{split}.txt"
    return [text for key, value in changes.items() for text in ("--set", f"{key}={value}")]


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("arm", ARMS)
def test_two_steps_of_every_arm(arm, folder, tmp_path):
    result = call("run", EXAMPLE, "--arm", arm, "--out", tmp_path / "runs", *changed(folder, tmp_path))
    assert result.exit_code == 0, result.output
    run = tmp_path / "runs" / "qwen_image_aegpo" / arm / "seed-0"
    steps = rows(run / "metrics.jsonl")
    assert [row["step"] for row in steps] == [1, 2]
    for metrics in (row["metrics"] for row in steps):
        assert all(math.isfinite(value) for value in metrics.values())
        assert metrics["grad_norm"] > 0
    learned = {key: weight for key, weight in load_latest(run / "checkpoints").tensors.items() if "lora_B" in key}
    assert learned
    assert any(bool(weight.any()) for weight in learned.values())  # lora_B begins at zero


def test_an_exported_run_is_loaded_by_the_pipeline_and_paints_the_same(folder, tmp_path):
    result = call("run", EXAMPLE, "--arm", "aegpo", "--out", tmp_path / "runs", *changed(folder, tmp_path))
    assert result.exit_code == 0, result.output
    run = tmp_path / "runs" / "qwen_image_aegpo" / "aegpo" / "seed-0"
    result = call("export", run, "--to", tmp_path / "lora")
    assert result.exit_code == 0, result.output
    found = find_run(run, load_registries(plugin_manager()))
    policy = Policy(found.experiment)
    policy.weights.take(found.weights(), found.where)
    noise, how = policy.evaluation_noise(numbered(HELD_OUT)), policy.painting(5)
    images = policy.images(numbered(HELD_OUT), noise, how)
    given = {"prompt": HELD_OUT, "true_cfg_scale": 4.0, "negative_prompt": [" "] * 2}
    again = their_images(folder, noise, lora=tmp_path / "lora", **given)
    assert float((images - again).abs().max()) < 1e-4
    assert float((again - their_images(folder, noise, **given)).abs().max()) > 1e-3
    assert (tmp_path / "lora" / "pytorch_lora_weights.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "command", "message"),
    [
        ("{empty}", "check", "has no model_index.json but nothing; a QwenImagePipeline as save_pretrained writes it"),
        ("{empty}", "run", "has no model_index.json but nothing; a QwenImagePipeline as save_pretrained writes it"),
        ("org/absent", "run", "hub id 'org/absent' is not in the cache, and HF_HUB_OFFLINE is set"),
    ],
)
def test_a_pipeline_that_is_not_there_is_said_without_a_traceback(path, command, message, tmp_path):
    (tmp_path / "empty").mkdir()
    words = [
        command,
        EXAMPLE,
        *changed(path.format(empty=tmp_path / "empty"), tmp_path, **{"model.height": 32, "model.width": 32}),
    ]
    words += ["--arm", "grpo", "--out", tmp_path / "runs"] if command == "run" else []
    done = subprocess.run([sys.executable, "-m", "aegpo", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_the_example_has_every_arm_and_says_that_it_was_not_run():
    assert tuple(load_arms(EXAMPLE)) == ARMS
    text = EXAMPLE.read_text().partition("\nname:")[0]
    for words in ("Deviates:", "Hardware, by arithmetic", "--set prompts.train=", "Not run on published weights"):
        assert words in text
