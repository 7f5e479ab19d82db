"""Images of prompts on their whole way: to a reward in training and evaluations, and to a model that reads them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from image_distance import pixels
from PIL import Image
from torch import Tensor
from worlds import BrightnessReward, GaussianModel, GaussianSpec, run_loop, small_experiment

from aegpo.commands.evaluate import evaluate
from aegpo.commands.evaluate_request import EvaluateRequest
from aegpo.commands.launch_request import LaunchRequest
from aegpo.commands.run import launch
from aegpo.commands.sample import paint_both
from aegpo.core.records import Conditioning, Prompt
from aegpo.core.sections import PromptsSpec, RolloutsSpec
from aegpo.errors import AegpoError, SpecError
from aegpo.plugin.manager import load_registries, plugin_manager
from aegpo.prompts.files import read_file
from aegpo.prompts.lists import numbered
from aegpo.runs.opening import find_run
from aegpo.train.engine import Engine
from aegpo.train.policy import Policy

LEVELS = {"dark": 20, "grey": 120, "bright": 230}
SMALL = """
name: small
training_steps: 2
device: cpu
model: {{kind: shapes, weights: {weights}}}
prompts: {{train: {folder}/train.jsonl, evaluation: {folder}/held-out.jsonl}}
rewards: [image-distance]
rollouts: {{prompts_per_step: 2, rollouts_per_step: 4, denoising_steps: 4, micro_batch: 2}}
optimizer: {{learning_rate: 0.03}}
checkpoint: {{every: 1}}
"""


def write(path: Path, *rows: dict[str, str]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def draw(folder: Path, size: int) -> None:
    for name, level in LEVELS.items():
        Image.new("RGB", (size, size), (level, level // 2, level)).save(folder / f"{name}.png")


@pytest.fixture(scope="module")
def ran(tmp_path_factory, tiny_weights) -> Path:
    """The folder of a run of 2 steps on prompts with images; two of them share their text."""
    folder = tmp_path_factory.mktemp("ran")
    draw(folder, 24)
    circle = "a red circle on a blue background"
    write(folder / "train.jsonl", *({"prompt": circle, "image": f"{name}.png"} for name in ("dark", "bright")))
    write(folder / "held-out.jsonl", *({"prompt": circle, "image": name} for name in ("grey.png", "./grey.png")))
    (folder / "small.yaml").write_text(SMALL.format(weights=tiny_weights, folder=folder))
    request = LaunchRequest(folder / "small.yaml", out=folder, report=False, plugins=("image_distance",))
    assert launch(request) == 0
    return folder


def test_a_run_learns_from_and_is_evaluated_by_distances_to_the_images_of_its_prompts(ran):
    run = ran / "small" / "main" / "seed-0"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert all(-1 < row["metrics"]["reward/image-distance"] < 0 for row in rows)
    found = find_run(run, load_registries(plugin_manager(["image_distance"])))
    policy = Policy(found.experiment)
    prompts = numbered(read_file(ran / "held-out.jsonl"))
    with policy.base():
        images = policy.images(prompts, policy.evaluation_noise(prompts))
    told = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    wanted = pixels(ran / "grey.png")
    distances = (-(images - wanted).abs().mean(dim=(1, 2, 3))).tolist()
    assert told[0]["base_scores"]["image-distance"] == pytest.approx(distances, abs=1e-6)
    assert [each["step"] for each in told] == [0, 2]


def test_evaluate_compares_with_the_images_of_a_file_of_prompts(ran, tmp_path):
    draw(tmp_path, 24)
    texts = ["a red circle", "two blue squares", "a red circle"]
    mine = write(
        tmp_path / "mine.jsonl",
        *({"prompt": text, "image": f"{name}.png"} for text, name in zip(texts, LEVELS, strict=True)),
    )
    run = ran / "small" / "main" / "seed-0"
    request = EvaluateRequest(run, prompts=str(mine), out=tmp_path / "out", plugins=("image_distance",))
    out, _ = evaluate(request)
    found = [json.loads(row) for row in (out / "scores.jsonl").read_text().splitlines()]
    opened = find_run(run, load_registries(plugin_manager(["image_distance"])))
    policy = Policy(opened.experiment)
    policy.weights.take(opened.weights(), opened.where)
    prompts = numbered(read_file(mine))  # the last asks what the first does, but of another image
    images = policy.images(prompts, policy.evaluation_noise(prompts), policy.painting())
    wanted = torch.stack([pixels(tmp_path / f"{name}.png") for name in LEVELS])
    distances = -(images - wanted).abs().mean(dim=(1, 2, 3))
    assert [row["prompt"] for row in found] == texts
    assert [row["policy"]["image-distance"][0][0] for row in found] == pytest.approx(distances.tolist(), abs=1e-6)
    (tmp_path / "grey.png").unlink()
    with pytest.raises(AegpoError, match=r"mine.jsonl, line 2: no image 'grey.png' in "):
        evaluate(EvaluateRequest(run, prompts=str(mine), out=tmp_path / "again", plugins=("image_distance",)))


def test_a_run_without_an_image_of_its_prompts_is_refused_at_load_with_the_line(ran, tmp_path):
    for name in ("small.yaml", "train.jsonl", "held-out.jsonl", "dark.png", "grey.png"):
        shutil.copy(ran / name, tmp_path)
    file = tmp_path / "small.yaml"
    file.write_text(file.read_text().replace(str(ran), str(tmp_path)))
    with pytest.raises(SpecError) as error:
        launch(LaunchRequest(file, out=tmp_path / "out", report=False, plugins=("image_distance",)))
    assert f"prompts.train: {tmp_path}/train.jsonl, line 2: no image 'bright.png' in '{tmp_path}'" in str(error.value)
    assert "prompts.evaluation" not in str(error.value)


# --- a model that reads them -----------------------------------------------------------------------------------------


class Repainting(GaussianModel):
    """Paints around the brightness of a prompt's image, whatever the text."""

    def encode(self, prompts: Sequence[Prompt]) -> Conditioning:
        levels = [float(pixels(prompt.images[0]).mean()) if prompt.images else 0.0 for prompt in prompts]
        return Conditioning(torch.tensor(levels).view(-1, 1, 1))


class RepaintingSpec(GaussianSpec):
    """Builds one."""

    reads_images: ClassVar[bool] = True

    def build(self, device):
        return Repainting(self)


class Noting(BrightnessReward):
    """Notes which brightness came of which prompt."""

    noted: ClassVar[list[tuple[Prompt, float]]] = []

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        scores = super().score(images, prompts)
        self.noted.extend(zip(prompts, scores.tolist(), strict=True))
        return scores


def test_a_model_that_reads_images_is_told_those_of_each_prompt_though_texts_are_the_same(tmp_path):
    draw(tmp_path, 4)
    train = write(tmp_path / "train.jsonl", *({"prompt": "so", "image": f"{name}.png"} for name in ("dark", "bright")))
    held_out = write(tmp_path / "held.jsonl", {"prompt": "so", "image": "grey.png"}, {"prompt": "so"})
    rollouts = RolloutsSpec(prompts_per_step=2, rollouts_per_step=64, denoising_steps=4)
    experiment = small_experiment(
        RepaintingSpec(spread=0.05),
        training_steps=2,
        rewards=(Noting(),),
        prompts=PromptsSpec(train=train, evaluation=held_out),
        rollouts=rollouts,
    )
    Noting.noted.clear()
    engine = Engine.build(experiment)
    run_loop(engine, tmp_path / "run")
    means: dict[str, list[float]] = {}
    for prompt, score in Noting.noted:
        means.setdefault(prompt.images[0].name if prompt.images else "none", []).append(score)
    assert set(means) == {"dark.png", "bright.png", "grey.png", "none"}
    assert max(means["dark.png"]) < min(means["bright.png"])
    assert max(means["none"]) < min(means["grey.png"])
    base, trained = paint_both(engine.policy, read_file(train), seed=0, steps=None)
    for dark, bright in (base, trained):
        assert sum(dark[0].tobytes()) < sum(bright[0].tobytes())
    assert engine.policy.encode(read_file(train)).text.flatten().tolist() == pytest.approx(
        [float(pixels(tmp_path / f"{name}.png").mean()) for name in ("dark", "bright")]
    )
