"""Steps of a plan that are not all alike: where each ends, what it passes through, and how much noise it adds.

A step ends at the next level unless the plan's `until` says a later one. The nodes in between pass through: their state
is that of the later level already, so nothing is evaluated, added or learned there. Tables of steps are therefore by
(level, until, scale), in the order of `kinds`; the T steps of an ordinary plan are their own kinds.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import numpy as np

from aegpo.core.interfaces import Sampler
from aegpo.core.records import BoolArray, FloatArray, IntArray, RolloutPlan
from aegpo.errors import ContractError


@dataclass(frozen=True)
class StepKinds:
    """The different steps of a plan, each once, by level."""

    level: IntArray  # (K,) the denoising step, where it begins
    until: IntArray  # (K,) the level where it ends
    scale: FloatArray | None  # (K,) factor of its noise rate; None: 1
    of: tuple[IntArray, ...]  # T arrays (N_{i+1},): which kind each edge is; -1 behind a node that passes through


def ends(plan: RolloutPlan) -> tuple[IntArray, ...]:  # T arrays (N_{i+1},)
    """The level at which the step to each node ends, which is the level its state belongs to."""
    if plan.until is not None:
        return plan.until
    return tuple(np.full(len(nodes), level + 1) for level, nodes in enumerate(plan.prompt[1:]))


def passing(plan: RolloutPlan) -> tuple[BoolArray, ...]:  # T arrays (N_i,)
    """Which nodes pass through, level by level."""
    if plan.until is None:
        return tuple(np.zeros(len(nodes), dtype=np.bool_) for nodes in plan.prompt[:-1])
    inside = (until > level + 1 for level, until in enumerate(plan.until[:-1]))
    return np.zeros(len(plan.prompt[0]), dtype=np.bool_), *inside


def last_steps(plan: RolloutPlan) -> tuple[BoolArray, ...]:  # T arrays (N_{i+1},)
    """Which edges are the last step of the rollouts below them: those that end at the image."""
    through, reached = passing(plan), ends(plan)
    steps = enumerate(zip(reached, plan.parent, strict=True))
    return tuple((end == plan.num_steps) & ~through[level][parent] for level, (end, parent) in steps)


def splits_last(plan: RolloutPlan) -> bool:
    """True if a rollout's last step begins where another's does."""
    edges = zip(plan.parent, last_steps(plan), strict=True)
    return any(bool((np.bincount(parent[last]) > 1).any()) for parent, last in edges)


def kinds(plan: RolloutPlan) -> StepKinds:
    """The different steps of a plan."""
    total = plan.num_steps
    if plan.until is None and plan.scale is None:
        levels = np.arange(total, dtype=np.int64)
        of = tuple(np.full(len(nodes), level) for level, nodes in enumerate(plan.prompt[1:]))
        return StepKinds(levels, levels + 1, None, of)
    scale = plan.scale or tuple(np.ones(len(nodes)) for nodes in plan.prompt[1:])
    steps = [np.column_stack([np.full(len(end), level), end, scale[level]]) for level, end in enumerate(ends(plan))]
    through = np.concatenate([now[parent] for now, parent in zip(passing(plan), plan.parent, strict=True)])
    found, which = np.unique(np.concatenate(steps)[~through], axis=0, return_inverse=True)
    joined = np.full(len(through), -1, dtype=np.int64)
    joined[~through] = which.ravel()
    levels, until = found[:, 0].astype(np.int64), found[:, 1].astype(np.int64)
    of = tuple(np.split(joined, np.cumsum([len(step) for step in steps])[:-1]))
    return StepKinds(levels, until, None if plan.scale is None else found[:, 2], of)


# --- contracts -------------------------------------------------------------------------------------------------------


def check_ends(name: str, until: IntArray, selected: BoolArray) -> None:
    """A selector's (P, T) int64 ends of steps: each after its step, the same for all steps of a run, T at most.

    Of a run only the first step may be chosen: it is the one step that is left.
    """
    who = f"selector {name!r}"
    _check_array(who, "ends of steps", until, selected.shape, "int64")
    total = selected.shape[1]
    levels = np.arange(total)
    _check_range(who, until.T, total)
    inside = until[:, :-1] > levels[1:]
    if (broken := np.argwhere(inside & (until[:, 1:] != until[:, :-1]))).size:
        prompt, level = broken[0]
        raise ContractError(
            f"{who} ends step {level} at level {until[prompt, level]}, but step {level + 1}, which is inside it, at "
            f"{until[prompt, level + 1]}; all steps of a run end at the same level"
        )
    if (chosen := np.argwhere(inside & selected[:, 1:])).size:
        raise ContractError(
            f"{who} chose step {chosen[0][1] + 1}, which it joins to an earlier one; choose the first step of a run"
        )


def check_steps(who: str, plan: RolloutPlan) -> None:
    """Scales and ends of a proper forest: noise that can be scaled, and nothing that happens inside a longer step."""
    if plan.scale is not None:
        _check_levels(who, "scale", plan.scale, plan, "float64")
        for level, scale in enumerate(plan.scale):
            if (wrong := ~(np.isfinite(scale) & (scale > 0))).any():
                raise ContractError(
                    f"{who} scales the noise of denoising step {level} by {scale[wrong][0]:g}; a scale is finite and "
                    "above 0, and a step without noise is one that is not 'noisy'"
                )
    if plan.until is not None:
        _check_levels(who, "until", plan.until, plan, "int64")
        _check_range(who, plan.until, plan.num_steps)
        for level, through in enumerate(passing(plan)):
            _check_inside(who, plan, level, through)


def _check_inside(who: str, plan: RolloutPlan, level: int, through: BoolArray) -> None:
    """Nothing happens at the nodes of a level that pass through."""
    assert plan.until is not None, "only plans with longer steps have such nodes"
    parent = plan.parent[level]
    edges, inside = through[parent], f"at level {level}, inside a longer step"
    if not edges.any():
        return
    if (np.bincount(parent[edges]) > 1).any():
        raise ContractError(f"{who} planned a split {inside}; split where the step begins")
    for field, happens in (("noise", plan.noisy[level]), ("learning", plan.trained[level])):
        if happens[edges].any():
            raise ContractError(f"{who} planned {field} {inside}; it belongs to the edge where the step begins")
    before, after = plan.until[level - 1][parent][edges], plan.until[level][edges]
    if (other := np.flatnonzero(before != after)).size:
        raise ContractError(
            f"{who} planned a step until level {before[other[0]]} that ends at {after[other[0]]} {inside}; "
            "all edges of a longer step name the same end"
        )


def check_scaling(name: str, sampler: Sampler) -> None:
    """A sampler whose step takes a `scale`; those of version 0.1 had none, and serve where no plan scales noise."""
    if "scale" not in inspect.signature(sampler.transition).parameters:
        raise ContractError(
            f"sampler {name!r} has transition(latents, velocity, sigma, sigma_next), as in aegpo 0.1, and cannot scale "
            "its noise; let it take 'scale: Tensor | None = None', (B,) factors of its noise rate, or choose a tree "
            "that scales none"
        )


def _check_range(who: str, until: tuple[IntArray, ...] | IntArray, total: int) -> None:
    for level, end in enumerate(until):
        if (wrong := (end <= level) | (end > total)).any():
            raise ContractError(
                f"{who} ends denoising step {level} at level {end[wrong][0]}; a step ends at level {level + 1} to "
                f"{total}"
            )


def _check_levels(
    who: str, field: str, arrays: tuple[FloatArray, ...] | tuple[IntArray, ...], plan: RolloutPlan, dtype: str
) -> None:
    if len(arrays) != plan.num_steps:
        raise ContractError(f"{who} planned {len(arrays)} denoising steps in {field!r}; {plan.num_steps} were asked")
    for step, array in enumerate(arrays):
        _check_array(who, f"{field!r} of step {step}", array, (len(plan.prompt[step + 1]),), dtype)


def _check_array(who: str, what: str, array: object, shape: tuple[int, ...], dtype: str) -> None:
    given = np.asarray(array)
    if not isinstance(array, np.ndarray) or given.shape != shape or given.dtype != dtype:
        raise ContractError(
            f"{who} returned {what} of shape {given.shape}, {given.dtype}; a numpy array of {shape}, {dtype} was asked"
        )
