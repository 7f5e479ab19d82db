"""How trajectories end after their last noisy step: fewer steps, and a solver of higher order."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from aegpo.core.records import BoolArray, FloatArray, RolloutPlan, Tail
from aegpo.core.sections import TailSpec
from aegpo.core.steps import ends

if TYPE_CHECKING:
    from torch import Tensor


def with_tail(plan: RolloutPlan, sigmas: FloatArray, spec: TailSpec) -> RolloutPlan:
    """The plan with its steps after the last noisy or trained one replaced; see `TailSpec` for how many there are."""
    total = plan.num_steps
    noisy = _reached(plan, plan.noisy)
    start = _whole(plan, max(noisy, _reached(plan, plan.trained)))  # the first level whose step is replaced
    if start == total:
        return replace(plan, tail=Tail(noisy, sigmas, spec.solver))
    steps = max(1, int((total - start + 1) * spec.ratio + 1e-9) - 1)
    places = np.linspace(start, total, steps + 1)
    levels = np.concatenate([sigmas[:start], np.interp(places, np.arange(total + 1), sigmas)])
    ancestor = np.arange(plan.num_rollouts)
    for parent in reversed(plan.parent[start:]):
        ancestor = parent[ancestor]
    nothing, once = np.zeros(plan.num_rollouts, dtype=np.bool_), np.ones(plan.num_rollouts)
    following = [np.full(plan.num_rollouts, start + step + 1) for step in range(steps)]
    return replace(
        plan,
        prompt=(*plan.prompt[: start + 1], *[plan.group] * steps),
        parent=(*plan.parent[:start], ancestor, *[np.arange(plan.num_rollouts)] * (steps - 1)),
        noisy=(*plan.noisy[:start], *[nothing] * steps),
        trained=(*plan.trained[:start], *[nothing] * steps),
        tail=Tail(noisy, levels, spec.solver),
        scale=None if plan.scale is None else (*plan.scale[:start], *[once] * steps),
        until=None if plan.until is None else (*plan.until[:start], *following),
    )


def _reached(plan: RolloutPlan, chosen: tuple[BoolArray, ...]) -> int:
    """The level at which the last of some edges ends; 0 where there is none."""
    return max((int(end[rows].max()) for end, rows in zip(ends(plan), chosen, strict=True) if rows.any()), default=0)


def _whole(plan: RolloutPlan, start: int) -> int:
    """The first level from `start` on that no longer step passes over."""
    while plan.until is not None and (later := max((int(u.max()) for u in plan.until[:start]), default=0)) > start:
        start = later
    return start


def second_order(
    velocity: Tensor, clean: Tensor, previous: Tensor, levels: tuple[float, float, float]
) -> Tensor:  # (B, *x)
    """The velocity whose Euler step is DPM-Solver++'s multistep of order 2, midpoint (arXiv 2211.01095, Alg. 2).

    `clean` and `previous` are x - sigma v now and one step ago; `levels` are sigma then, now and next. With
    lambda = log((1 - sigma) / sigma) and steps h in it, the step aims at clean + h / (2 h_before) (clean - previous);
    Euler aims at `clean`, from x, by (x - clean) / sigma.
    """
    before, now, following = (math.inf if s <= 0 else -math.inf if s >= 1 else math.log((1 - s) / s) for s in levels)
    weight = 0.0 if math.isinf(before) else (following - now) / (2 * (now - before))
    return velocity - weight * (clean - previous) / levels[1]
