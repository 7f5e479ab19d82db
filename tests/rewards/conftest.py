"""Ground-truth pictures of captions of every kind and both splits."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from aegpo.models.shapes.captions import scenes
from aegpo.models.shapes.rendering import render

PER_KIND = 300


@dataclass(frozen=True)
class Renders:
    images: Tensor  # (N, 3, 24, 24)
    captions: list[str]
    others: list[str]  # for each image the caption of another one, never its own


@pytest.fixture(scope="session")
def renders() -> Renders:
    pick, rng = random.Random(1), np.random.default_rng(0)
    drawn = [
        scene
        for split in ("train", "evaluation")
        for members in scenes(split).values()
        for scene in pick.choices(members, k=PER_KIND)
    ]
    captions = [scene.caption for scene in drawn]
    others = []
    for caption in captions:
        other = pick.choice(captions)
        while other == caption:
            other = pick.choice(captions)
        others.append(other)
    images = torch.from_numpy(np.stack([render(scene, rng) for scene in drawn])).permute(0, 3, 1, 2)
    return Renders(images, captions, others)


@pytest.fixture(scope="session")
def noisy(renders: Renders) -> Tensor:
    """The same pictures under Gaussian noise of standard deviation 0.05."""
    noise = torch.randn(renders.images.shape, generator=torch.Generator().manual_seed(0))
    return (renders.images + 0.05 * noise).clamp(0, 1)
