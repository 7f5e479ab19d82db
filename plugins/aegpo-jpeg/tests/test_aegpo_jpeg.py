"""The plugin as installed: found through its entry point, and conforming."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from aegpo_jpeg import JpegSize, JpegTarget
from PIL import Image
from pydantic import ValidationError

from aegpo import AegpoError, ContractError, Prompt, SpecError
from aegpo.testing import check_installed, check_reward, load_arms


def prompts(count: int) -> list[Prompt]:
    return [Prompt(number, "x") for number in range(count)]


@pytest.mark.parametrize("quality", [1, 50, 95, 100])
def test_it_conforms(quality):
    check_reward(JpegSize(quality=quality))


def test_it_is_found_through_its_entry_point():
    check_installed(JpegSize, "aegpo-jpeg")
    check_installed(JpegTarget, "aegpo-jpeg")


def test_it_can_be_left_out(monkeypatch):
    monkeypatch.setenv("AEGPO_BLOCK_PLUGINS", "aegpo-jpeg")
    with pytest.raises(ContractError, match="spec 'JpegSize' is not registered; distribution 'aegpo-jpeg' needs an "):
        check_installed(JpegSize, "aegpo-jpeg")


def test_a_flat_image_scores_higher_than_noise():
    noise = torch.rand((1, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    flat, noisy = JpegSize().score(torch.cat([torch.full((1, 3, 32, 32), 0.5), noise]), prompts(2))
    assert noisy < flat < 0


def test_a_score_is_minus_the_bytes_of_the_file():
    image = torch.linspace(0, 1, 3 * 16 * 16).view(1, 3, 16, 16)
    file = io.BytesIO()
    pixels = (image[0] * 255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(file, format="JPEG", quality=30)
    (score,) = JpegSize(quality=30).score(image, prompts(1))
    assert int(score) == -len(file.getvalue())


def test_lower_quality_makes_smaller_files():
    image = torch.rand((1, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    scores = [float(JpegSize(quality=quality).score(image, prompts(1))[0]) for quality in (100, 50, 1)]
    assert scores == sorted(scores)


@pytest.mark.parametrize("quality", [0, 101])
@pytest.mark.parametrize("spec", [JpegSize, JpegTarget])
def test_a_quality_out_of_range_is_refused(quality, spec):
    with pytest.raises(ValidationError):
        spec(quality=quality)


# --- jpeg-target -----------------------------------------------------------------------------------------------------


def wanted(*targets: object) -> list[Prompt]:
    return [Prompt(number, "x", {"target_bytes": target}) for number, target in enumerate(targets)]


@pytest.mark.parametrize("quality", [1, 95])
def test_a_target_is_read_from_metadata_and_conforms(quality):
    check_reward(JpegTarget(quality=quality), wanted(700, 900, 1200.5))


def test_the_score_is_minus_the_distance_to_the_target_as_a_share_of_it():
    image = torch.rand((1, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    size = -int(JpegSize().score(image, prompts(1))[0])
    targets = (size, 2 * size, size / 2, size - 1, size + 1)
    scores = JpegTarget().score(image.expand(5, -1, -1, -1), wanted(*targets)).tolist()
    assert scores == pytest.approx([0, -0.5, -1, -1 / (size - 1), -1 / (size + 1)])


def test_each_image_is_held_to_the_target_of_its_own_prompt():
    noise = torch.rand((1, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    images = torch.cat([torch.full((1, 3, 32, 32), 0.5), noise])
    flat, noisy = (-int(score) for score in JpegSize().score(images, prompts(2)))
    assert flat < noisy
    assert JpegTarget().score(images, wanted(flat, noisy)).tolist() == [0, 0]
    assert max(JpegTarget().score(images, wanted(noisy, flat)).tolist()) < -0.1


@pytest.mark.parametrize("target", [0, -3, "900", True, float("nan"), float("inf")])
def test_a_target_that_is_no_size_is_refused_in_words(target):
    why = f"its 'target_bytes' is {target!r}; a number of bytes above 0 was expected"
    assert JpegTarget().refuses(wanted(target)[0]) == why
    with pytest.raises(AegpoError) as error:
        JpegTarget(name="size").score(torch.zeros(1, 3, 8, 8), wanted(target))
    assert str(error.value) == f"reward 'size' cannot score prompt 'x': {why}"


FILE = """
name: sizes
model: shapes
prompts: {train: train.jsonl, evaluation: held-out.jsonl}
rewards: [{kind: jpeg-target, name: size}]
rollouts: {prompts_per_step: 2, rollouts_per_step: 8}
"""


def test_prompts_of_files_need_a_target_each(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good, dog = '{"prompt": "a cat", "target_bytes": 900}\n', '{"prompt": "a dog", "target_bytes": 800}\n'
    (tmp_path / "sizes.yaml").write_text(FILE)
    (tmp_path / "train.jsonl").write_text(good + dog)
    (tmp_path / "held-out.jsonl").write_text('{"prompt": "a bird", "target_bytes": 1200}\n')
    load_arms(Path("sizes.yaml"))
    for row, message in (
        ('{"prompt": "a fox"}', "reward 'size' needs 'target_bytes', but this prompt has no metadata"),
        (
            '{"prompt": "a fox", "target_bytes": "small"}',
            "reward 'size' cannot score this prompt: its 'target_bytes' is 'small'; a number of bytes above 0",
        ),
    ):
        (tmp_path / "train.jsonl").write_text(good + dog + "\n" + row)
        with pytest.raises(SpecError) as error:
            load_arms(Path("sizes.yaml"))
        assert f"sizes.yaml:4:18: prompts.train: {tmp_path / 'train.jsonl'}, line 4: {message}" in str(error.value)
