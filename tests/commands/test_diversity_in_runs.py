"""Reward `diversity` from a file to its report: a run on the embedded model, and `evaluate` on what it left."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import aegpo
from PIL import Image

from aegpo.commands.evaluate import evaluate
from aegpo.commands.evaluate_request import EvaluateRequest
from aegpo.commands.launch_request import LaunchRequest
from aegpo.commands.run import launch
from aegpo.errors import AegpoError
from aegpo.plugin.manager import load_registries, plugin_manager
from aegpo.prompts.lists import numbered
from aegpo.rewards.diversity import DiversityReward
from aegpo.rewards.palette import PaletteReward
from aegpo.runs.opening import find_run
from aegpo.train.held_out import repeated
from aegpo.train.policy import Policy

SPEC = """
name: small
training_steps: 2
device: cpu
model: {{kind: shapes, weights: {weights}}}
prompts: {{train_count: 4, evaluation_count: 3}}
rewards: [palette]
rollouts: {{prompts_per_step: 2, rollouts_per_step: 4, denoising_steps: 4, micro_batch: 4}}
optimizer: {{learning_rate: 0.03}}
checkpoint: {{every: 1}}
evaluation: {{images: 2, images_per_prompt: 2, rewards: [diversity]}}
"""
TWICE = "two red circles on a green background\n" * 2 + "a green triangle on a blue background\n"


@pytest.fixture(scope="module")
def run(experiment) -> Path:
    assert launch(LaunchRequest(experiment, out=experiment.parent, report=True)) == 0
    return experiment.parent / "small" / "main" / "seed-0"


@pytest.fixture(scope="module")
def last(run) -> dict:
    return [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()][-1]


@pytest.fixture
def single(experiment, tmp_path) -> Path:
    """The same with one image of each prompt, and nothing that compares them."""
    path = tmp_path / "single.yaml"
    path.write_text(
        experiment.read_text().replace("images_per_prompt: 2, rewards: [diversity]", "images_per_prompt: 1")
    )
    return path


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]


def test_a_run_records_one_score_a_prompt_and_its_report_shows_them(run, last):
    assert list(last["scores"]) == ["palette", "diversity"]
    assert {len(values) for table in ("scores", "base_scores") for values in last[table].values()} == {3}
    assert last["scores"]["diversity"] != last["base_scores"]["diversity"]
    assert all(0 < value < 1 for value in last["scores"]["diversity"])
    found = json.loads((run.parents[1] / "report" / "summary.json").read_text())
    (line,) = [each for each in found["scores"] if each["label"] == "diversity"]
    assert line["base"] == pytest.approx(np.mean(last["base_scores"]["diversity"]))
    page = " ".join((run.parents[1] / "report.html").read_text().split())
    assert "2 fixed start noises each, scores averaged, deterministic sampler" in page


def test_evaluate_paints_what_the_run_evaluated_image_by_image(run, last, tmp_path):
    out, _ = evaluate(EvaluateRequest(run, out=tmp_path / "out"))
    assert json.loads((out / "summary.json").read_text())["images_per_prompt"] == 2
    found = rows(out)
    assert [row["prompt"] for row in found] == last["prompts"]
    for column, table in (("policy", "scores"), ("base", "base_scores")):
        for label in ("palette", "diversity"):
            each = np.array([row[column][label] for row in found])  # (prompts, seeds, images)
            assert each.shape == (3, 1, 2)
            assert each.mean(axis=(1, 2)) == pytest.approx(last[table][label], abs=1e-6)


def test_several_images_are_those_that_policy_and_base_paint(run, tmp_path):
    (tmp_path / "twice.txt").write_text(TWICE)
    request = EvaluateRequest(run, ("palette", "diversity"), str(tmp_path / "twice.txt"), 3, out=tmp_path / "out")
    out, _ = evaluate(request)
    found = find_run(run, load_registries(plugin_manager()))
    policy, prompts = Policy(found.experiment), numbered(TWICE.splitlines())
    policy.weights.take(found.weights(), found.where)
    each, noise = repeated(prompts, 3), policy.evaluation_noise(prompts, 0, 3)
    with policy.base():
        base = policy.images(each, noise)
    for column, images in (("base", base), ("policy", policy.images(each, noise))):
        palette = PaletteReward().score(images, each).reshape(3, 3).numpy()
        groups = [DiversityReward().score(group, numbered("xxx")) for group in images.split(3)]
        for index, row in enumerate(rows(out)):
            assert row[column]["palette"][0] == pytest.approx(palette[index], abs=1e-6)
            assert row[column]["diversity"][0] == pytest.approx(groups[index].numpy(), abs=1e-6)
        for number, image in enumerate(images):
            folder = out / (column if number % 3 == 0 else f"{column}-{number % 3 + 1}")
            with Image.open(folder / "twice" / f"{number // 3:05d}.jpg") as picture:
                seen = torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255).permute(2, 0, 1)
            assert (seen - image).abs().mean() < 0.03


def test_rewards_that_compare_nothing_score_the_first_images_as_if_they_were_alone(run, tmp_path):
    request = EvaluateRequest(run, ("palette",), out=tmp_path / "out")
    for images in (1, 2, 5):  # within a micro-batch, and beyond it
        evaluate(replace(request, images_per_prompt=images, out=tmp_path / str(images)))
    for one, two, five in zip(*(rows(tmp_path / str(images)) for images in (1, 2, 5)), strict=True):
        for column in ("base", "policy"):
            ((first,), (second,), (fifth,)) = (row[column]["palette"] for row in (one, two, five))
            assert first == pytest.approx(second[:1], abs=1e-6)
            assert second == pytest.approx(fifth[:2], abs=1e-6)


def test_a_model_alone_has_diversity(experiment, run, last, tmp_path):
    out, found = evaluate(EvaluateRequest(experiment, ("diversity",), out=tmp_path / "out"))
    assert [row["base"]["diversity"][0] for row in rows(out)] == [
        pytest.approx([value, value], abs=1e-6) for value in last["base_scores"]["diversity"]
    ]
    assert found.lines[0].policy is None


def test_one_image_has_nothing_to_be_compared_with(single, tmp_path):
    request = EvaluateRequest(single, ("diversity",), out=tmp_path / "out")
    message = (
        "reward 'diversity' compares the images of a prompt with one another, but one of each is painted; "
        "give --images-per-prompt 2 or more, or leave the reward out"
    )
    with pytest.raises(AegpoError, match=message):
        evaluate(request)
    assert not (tmp_path / "out").exists()
    evaluate(replace(request, images_per_prompt=2))


def test_check_names_the_reward_and_what_to_write(single, monkeypatch):
    monkeypatch.chdir(single.parent)
    words = ["check", single.name, "--set", "evaluation.rewards=[scene, diversity]"]
    refused = aegpo(*words)
    assert refused.code == 2
    assert "evaluation.rewards.1: reward 'diversity' compares the images of a prompt with one another" in refused.stderr
    assert "write 'images_per_prompt: 2' or more under 'evaluation'" in refused.stderr
    assert aegpo(*words, "--set", "evaluation.images_per_prompt=2").code == 0
