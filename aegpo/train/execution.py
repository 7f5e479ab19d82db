"""How plans are executed: the network, the sampler, the noise levels, and trajectories that are known already."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from aegpo.core.interfaces import Model, Sampler
from aegpo.core.records import Conditioning, IntArray, RolloutPlan
from aegpo.method.trees import trunk_levels

Velocity = Callable[[Tensor, Tensor, Conditioning], Tensor]
Show = Callable[[Tensor], None]  # is given images (b, 3, h, w) as soon as they are painted, in the order of rollouts


def unseen(images: Tensor) -> None:
    """Nobody looks before all are there."""


@dataclass(frozen=True)
class Execution:
    """How plans are executed in a run."""

    model: Model
    velocity: Velocity  # the policy's, in the run's precision, float32 out
    sampler: Sampler
    sigmas: Tensor  # (T+1,)
    micro_batch: int
    storage: torch.dtype
    keep_velocity: bool = False  # of trained edges, for objectives that need the policy that sampled
    predicted_clean: bool = False  # images come from a deterministic last step, whatever the trained one did
    model_kind: str = "(unnamed)"  # how messages call them
    sampler_kind: str = "(unnamed)"


@dataclass(frozen=True)
class Trunk:
    """Deterministic trajectories of some prompts that were computed already: trees may start with them.

    A prompt whose plan has one tree starts it from this noise, and what the network says along the tree's trunk, up to
    the first noisy step, is read off here.
    """

    prompt: IntArray  # (K,) rows of the step's Conditioning, each once
    noise: Tensor  # (K, C, H, W)
    velocity: tuple[Tensor, ...] = ()  # (K, C, H, W) float32 each, at the first levels

    def levels(self, plan: RolloutPlan) -> IntArray:  # (K,)
        """At how many levels of the plan the velocity of each prompt's only node is here."""
        return np.minimum(trunk_levels(plan)[self.prompt], len(self.velocity))

    def saved(self, plan: RolloutPlan) -> int:
        """Velocity evaluations of the plan that need not be made."""
        return int(self.levels(plan).sum())
