"""The plugin as installed: found through its entry point, and conforming."""

from __future__ import annotations

import io

import pytest
import torch
from aegpo_jpeg import JpegSize
from PIL import Image
from pydantic import ValidationError

from aegpo import ContractError
from aegpo.testing import check_installed, check_reward


@pytest.mark.parametrize("quality", [1, 50, 95, 100])
def test_it_conforms(quality):
    check_reward(JpegSize(quality=quality))


def test_it_is_found_through_its_entry_point():
    check_installed(JpegSize, "aegpo-jpeg")


def test_it_can_be_left_out(monkeypatch):
    monkeypatch.setenv("AEGPO_BLOCK_PLUGINS", "aegpo-jpeg")
    with pytest.raises(ContractError, match="spec 'JpegSize' is not registered; distribution 'aegpo-jpeg' needs an "):
        check_installed(JpegSize, "aegpo-jpeg")


def test_a_flat_image_scores_higher_than_noise():
    noise = torch.rand((1, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    flat, noisy = JpegSize().score(torch.cat([torch.full((1, 3, 32, 32), 0.5), noise]), ["", ""])
    assert noisy < flat < 0


def test_a_score_is_minus_the_bytes_of_the_file():
    image = torch.linspace(0, 1, 3 * 16 * 16).view(1, 3, 16, 16)
    file = io.BytesIO()
    pixels = (image[0] * 255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(file, format="JPEG", quality=30)
    (score,) = JpegSize(quality=30).score(image, ["x"])
    assert int(score) == -len(file.getvalue())


def test_lower_quality_makes_smaller_files():
    image = torch.rand((1, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    scores = [float(JpegSize(quality=quality).score(image, ["x"])[0]) for quality in (100, 50, 1)]
    assert scores == sorted(scores)


@pytest.mark.parametrize("quality", [0, 101])
def test_a_quality_out_of_range_is_refused(quality):
    with pytest.raises(ValidationError):
        JpegSize(quality=quality)
