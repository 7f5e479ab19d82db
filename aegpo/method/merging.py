"""Steps that are taken at once: a run of denoising steps as one, from its first level to its last."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from aegpo.core.records import BoolArray, FloatArray, IntArray, RolloutPlan
from aegpo.errors import PlanError


def with_merged(plan: RolloutPlan, until: IntArray) -> RolloutPlan:
    """The plan with runs of steps joined; `until` (P, T) is the level at which each step of each prompt ends.

    The one step of a run has all the splits that the tree had inside it, noise if any of its steps had, with the
    largest scale among those, and is trained if any of them was. The nodes in between pass through.

    Raises:
        PlanError: if the tree has joined steps already.
    """
    if plan.until is not None:
        raise PlanError("the tree has steps that end later than at the next level already; choose another selector")
    levels = np.arange(plan.num_steps)[:, None]
    if (until == np.arange(1, plan.num_steps + 1)).all():
        return plan
    ends = until[plan.group].T  # (T, N), of the steps of each rollout
    arrived = np.concatenate([np.zeros_like(ends[:1]), ends])  # (T+1, N) the level that its state at each level is of
    inside = arrived[:-1] > levels
    paths = _paths(plan)
    states = np.take_along_axis(paths, arrived, axis=0)
    fresh = np.ones_like(states, dtype=np.bool_)  # rollouts that are the first of their node
    fresh[:, 1:] = (np.diff(states) != 0) | (np.diff(plan.group) != 0)
    node = np.cumsum(fresh, axis=1) - 1
    first = [np.flatnonzero(level) for level in fresh]

    def by_edge(values: np.ndarray) -> tuple[np.ndarray, ...]:  # (T, N) -> T arrays (N_{i+1},)
        return tuple(level[rows] for level, rows in zip(values, first[1:], strict=True))

    noisy = _along(plan.noisy, paths)
    scale = noisy if plan.scale is None else np.where(noisy, _along(plan.scale, paths), 0.0)
    loudest = _gathered(scale, ends)
    return replace(
        plan,
        prompt=tuple(plan.group[rows] for rows in first),
        parent=by_edge(node[:-1]),
        noisy=by_edge(_gathered(noisy, ends) & ~inside),
        trained=by_edge(_gathered(_along(plan.trained, paths), ends) & ~inside),
        scale=None if plan.scale is None else by_edge(np.where(inside | (loudest == 0), 1.0, loudest)),
        until=by_edge(ends),
    )


def _paths(plan: RolloutPlan) -> IntArray:  # (T+1, N)
    """The nodes that each rollout goes through."""
    nodes = [np.arange(plan.num_rollouts)]
    for parent in reversed(plan.parent):
        nodes.append(parent[nodes[-1]])
    return np.stack(nodes[::-1])


def _along(values: tuple[BoolArray, ...] | tuple[FloatArray, ...], paths: IntArray) -> np.ndarray:  # (T, N)
    """What T arrays (N_{i+1},) say of the edges of each rollout."""
    return np.stack([level[nodes] for level, nodes in zip(values, paths[1:], strict=True)])


def _gathered(values: np.ndarray, ends: IntArray) -> np.ndarray:  # (T, N)
    """The most that is said from each step to the end of its run."""
    found = values.copy()
    for level in reversed(range(len(found) - 1)):
        within = ends[level] > level + 1
        found[level] = np.where(within, np.maximum(found[level], found[level + 1]), found[level])
    return found
