"""A plugin as somebody would write it: a world of 3-frame videos, a reward of motion, and rewards that know no frames.

It comes in by the door alone and imports no torch; the network is in `video_model`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field

import aegpo

if TYPE_CHECKING:
    import torch
    from torch import Tensor

COLOURS = ("red", "green", "blue", "white")
WAYS = ("left", "right", "up", "down", "nowhere")
CAPTIONS = tuple(f"a {colour} dot moves {way}" for colour, way in product(COLOURS, WAYS))


class TinyVideos(aegpo.ModelSpec):
    """Dots that move over 3 frames of 8 x 8 pixels; what is trained is a transformer of a few thousand weights."""

    kind: Literal["tiny-videos"] = "tiny-videos"
    media: ClassVar[Literal["video"]] = "video"
    has_captions: ClassVar[bool] = True
    attention_blocks: ClassVar[tuple[str, ...] | None] = ("self",)
    seed: int = Field(default=0, description="of the weights")

    @property
    def dimensions(self) -> int | None:
        """C x F x H x W."""
        return 3 * 3 * 8 * 8

    def sigmas(self, steps: int) -> aegpo.FloatArray:
        """Equal steps."""
        return np.linspace(1.0, 0.0, steps + 1)

    def captions(self, split: Literal["train", "evaluation"], count: int, seed: int) -> tuple[str, ...]:
        """Every fourth is held out."""
        return tuple(text for row, text in enumerate(CAPTIONS) if (row % 4 == 3) == (split == "evaluation"))[:count]

    def build(self, device: torch.device) -> aegpo.Model:
        """The network."""
        from video_model import VideoModel

        return VideoModel(self.seed, self.sigmas, device)


class Motion(aegpo.RewardSpec):
    """How much changes from frame to frame, in [0, 1]."""

    kind: Literal["motion"] = "motion"
    media: ClassVar[Literal["video"]] = "video"

    def score(self, images: Tensor, prompts: Sequence[aegpo.Prompt]) -> Tensor:
        """(N, F, 3, h, w) in [0, 1] and N prompts -> (N,) float32, higher is better."""
        return images.diff(dim=1).abs().flatten(1).mean(dim=1)


class Redness(aegpo.RewardSpec):
    """How red an image is, in [-1, 1]; it was written for images and knows no frames."""

    kind: Literal["redness"] = "redness"

    def score(self, images: Tensor, prompts: Sequence[aegpo.Prompt]) -> Tensor:
        """(N, 3, h, w) in [0, 1] and N prompts -> (N,) float32, higher is better."""
        red, green, blue = images.mean(dim=(2, 3)).unbind(dim=1)
        return red - (green + blue) / 2


class Light(aegpo.RewardSpec):
    """The mean of all pixels of an image or a video."""

    kind: Literal["light"] = "light"
    media: ClassVar[Literal["both"]] = "both"

    def score(self, images: Tensor, prompts: Sequence[aegpo.Prompt]) -> Tensor:
        """(N, [F,] 3, h, w) in [0, 1] and N prompts -> (N,) float32, higher is better."""
        return images.flatten(1).mean(dim=1)


@aegpo.hookimpl
def aegpo_register_models(registry: aegpo.Registry[aegpo.ModelSpec]) -> None:
    registry.add(TinyVideos)


@aegpo.hookimpl
def aegpo_register_rewards(registry: aegpo.Registry[aegpo.RewardSpec]) -> None:
    for spec in (Motion, Redness, Light):
        registry.add(spec)
