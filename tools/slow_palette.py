"""A plugin for `tools/bench.py rewards`: reward `palette`, which takes its time, as a large network would."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

import aegpo
from aegpo.core.registry import Registry
from aegpo.rewards.palette import PaletteReward

if TYPE_CHECKING:
    from torch import Tensor


class SlowPaletteReward(aegpo.RewardSpec):
    """What `palette` says, after a pause for each image."""

    kind: Literal["slow-palette"] = "slow-palette"
    seconds: float = Field(0.01, ge=0, description="pause for each image")

    def score(self, images: Tensor, prompts: Sequence[aegpo.Prompt]) -> Tensor:
        """(N, 3, 24, 24) in [0, 1] and N captions -> (N,) float32 in [0, 1], higher is better."""
        time.sleep(self.seconds * len(prompts))
        return PaletteReward().score(images, prompts)


@aegpo.hookimpl
def aegpo_register_rewards(registry: Registry[aegpo.RewardSpec]) -> None:
    """Adds the reward."""
    registry.add(SlowPaletteReward)
