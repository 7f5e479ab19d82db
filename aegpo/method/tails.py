"""How trajectories end after their last noisy step: fewer steps, and a solver of higher order."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from aegpo.core.records import FloatArray, RolloutPlan, Tail
from aegpo.core.sections import TailSpec

if TYPE_CHECKING:
    from torch import Tensor


def with_tail(plan: RolloutPlan, sigmas: FloatArray, spec: TailSpec) -> RolloutPlan:
    """The plan with its steps after the last noisy or trained one replaced; see `TailSpec` for how many there are."""
    total = plan.num_steps
    noisy = max((level for level in range(total) if plan.noisy[level].any()), default=-1)
    last = max((level for level in range(total) if plan.trained[level].any()), default=-1)
    last = max(noisy, last)
    if last == total - 1:
        return replace(plan, tail=Tail(noisy + 1, sigmas, spec.solver))
    steps = max(1, int((total - last) * spec.ratio + 1e-9) - 1)
    places = np.linspace(last + 1, total, steps + 1)
    levels = np.concatenate([sigmas[: last + 1], np.interp(places, np.arange(total + 1), sigmas)])
    ancestor = np.arange(plan.num_rollouts)
    for parent in reversed(plan.parent[last + 1 :]):
        ancestor = parent[ancestor]
    nothing = np.zeros(plan.num_rollouts, dtype=np.bool_)
    return replace(
        plan,
        prompt=(*plan.prompt[: last + 2], *[plan.group] * steps),
        parent=(*plan.parent[: last + 1], ancestor, *[np.arange(plan.num_rollouts)] * (steps - 1)),
        noisy=(*plan.noisy[: last + 1], *[nothing] * steps),
        trained=(*plan.trained[: last + 1], *[nothing] * steps),
        tail=Tail(noisy + 1, levels, spec.solver),
    )


def second_order(
    velocity: Tensor, clean: Tensor, previous: Tensor, levels: tuple[float, float, float]
) -> Tensor:  # (B, C, H, W)
    """The velocity whose Euler step is DPM-Solver++'s multistep of order 2, midpoint (arXiv 2211.01095, Alg. 2).

    `clean` and `previous` are x - sigma v now and one step ago; `levels` are sigma then, now and next. With
    lambda = log((1 - sigma) / sigma) and steps h in it, the step aims at clean + h / (2 h_before) (clean - previous);
    Euler aims at `clean`, from x, by (x - clean) / sigma.
    """
    before, now, following = (math.inf if s <= 0 else -math.inf if s >= 1 else math.log((1 - s) / s) for s in levels)
    weight = 0.0 if math.isinf(before) else (following - now) / (2 * (now - before))
    return velocity - weight * (clean - previous) / levels[1]
