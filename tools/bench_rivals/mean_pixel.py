"""A plugin: reward `mean-pixel`, which costs nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import aegpo
from aegpo.core.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor


class MeanPixelReward(aegpo.RewardSpec):
    """The mean of all pixels."""

    kind: Literal["mean-pixel"] = "mean-pixel"

    def score(self, images: Tensor, prompts: Sequence[aegpo.Prompt]) -> Tensor:
        """(N, 3, h, w) in [0, 1] -> (N,) float32."""
        return images.mean(dim=(1, 2, 3))


@aegpo.hookimpl
def aegpo_register_rewards(registry: Registry[aegpo.RewardSpec]) -> None:
    """Adds the reward."""
    registry.add(MeanPixelReward)
