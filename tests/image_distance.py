"""A plugin: a reward that compares with a prompt's image; importable without torch, as every spec must be."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import aegpo

if TYPE_CHECKING:
    from torch import Tensor


class ImageDistance(aegpo.RewardSpec):
    """Minus the mean distance of an image's pixels to those of the first image of its prompt, in [-1, 0]."""

    kind: Literal["image-distance"] = "image-distance"
    needs_images: ClassVar[bool] = True

    def score(self, images: Tensor, prompts: Sequence[aegpo.Prompt]) -> Tensor:
        import torch

        wanted = torch.stack([pixels(prompt.images[0]) for prompt in prompts]).to(images)
        return -(images - wanted).abs().mean(dim=(1, 2, 3))


def pixels(path: Path) -> Tensor:  # (3, h, w) in [0, 1]
    """An image file."""
    import numpy as np
    import torch
    from PIL import Image

    with Image.open(path) as picture:
        return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1) / 255


@aegpo.hookimpl
def aegpo_register_rewards(registry: aegpo.Registry[aegpo.RewardSpec]) -> None:
    registry.add(ImageDistance)
