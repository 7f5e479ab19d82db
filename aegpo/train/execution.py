"""How plans are executed: the network, the sampler, the noise levels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from aegpo.core.interfaces import Model, Sampler
from aegpo.core.records import Conditioning

Velocity = Callable[[Tensor, Tensor, Conditioning], Tensor]
Look = Callable[[int, Tensor], None]  # is given the next (b, *x) predicted clean latents of a level, as nodes go
Show = Callable[[Tensor], None]  # is given images (b, [F,] 3, h, w) as soon as painted, in the order of rollouts


def never() -> bool:
    """What is not trained cannot diverge."""
    return False


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
    diverged: Callable[[], bool] = never  # asked once something is not finite: did training do it?
