"""A plugin: reward `mean-pixel`, which costs nothing, and model `sd3-in-even-times`, with Flow-Factory's schedule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import aegpo
from aegpo.core.records import FloatArray
from aegpo.core.registry import Registry
from aegpo.models.pipeline.schedules import FlowSchedule, flow_schedule
from aegpo.models.sd3 import SHIFT, Sd3Spec

if TYPE_CHECKING:
    from torch import Tensor


class MeanPixelReward(aegpo.RewardSpec):
    """The mean of all pixels."""

    kind: Literal["mean-pixel"] = "mean-pixel"

    def score(self, images: Tensor, prompts: Sequence[aegpo.Prompt]) -> Tensor:
        """(N, 3, h, w) in [0, 1] -> (N,) float32."""
        return images.mean(dim=(1, 2, 3))


class EvenSd3Spec(Sd3Spec):
    """Stable Diffusion 3 on times 1, 1 - 1/T, ... 1/T before they are shifted, as Flow-Factory has it."""

    kind: Literal["sd3-in-even-times"] = "sd3-in-even-times"  # type: ignore[assignment]

    def noise_levels(self, steps: int, height: int, width: int) -> FloatArray:  # (steps+1,)
        """Its schedule."""
        config = self.config_at_hand("scheduler", "scheduler_config.json")
        return flow_schedule(self.kind, config, FlowSchedule(shift=SHIFT)).from_one_to_part(steps, 0)


@aegpo.hookimpl
def aegpo_register_rewards(registry: Registry[aegpo.RewardSpec]) -> None:
    """Adds the reward."""
    registry.add(MeanPixelReward)


@aegpo.hookimpl
def aegpo_register_models(registry: Registry[aegpo.ModelSpec]) -> None:
    """Adds the model."""
    registry.add(EvenSd3Spec)
