"""The forest of a training step as index arrays: every method's rollouts are trees that split somewhere else.

Independent rollouts are the tree that splits only at its root. `forest` grows any of them level by level from three
decisions: how many roots, how many children each node gets, and which steps are noisy.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from aegpo.core.records import BoolArray, IntArray, RolloutPlan

Children = Callable[[int, int, int], int]  # (prompt, level, nodes) -> nodes of that prompt one level further


def forest(
    roots: IntArray, steps: BoolArray, noisy: BoolArray, children: Children, start: IntArray | None = None
) -> RolloutPlan:
    """Grows (P,) roots level by level; nodes of one prompt stay together and in order.

    Edges are trained where the step was chosen and the prompt has several nodes to compare.
    """
    widths = roots.copy()  # (P,) nodes of each prompt at the current level
    prompts = np.arange(len(roots))
    levels: dict[str, list[np.ndarray]] = {
        "prompt": [np.repeat(prompts, widths)],
        "parent": [],
        "noisy": [],
        "trained": [],
    }
    for level in range(steps.shape[1]):
        wanted = np.array([children(int(p), level, int(widths[p])) for p in prompts], dtype=np.int64)
        starts = np.concatenate([[0], np.cumsum(widths)[:-1]])
        parent = [start + spread(int(old), int(new)) for start, old, new in zip(starts, widths, wanted, strict=True)]
        child_prompt = np.repeat(prompts, wanted)
        levels["prompt"].append(child_prompt)
        levels["parent"].append(np.concatenate(parent))
        levels["noisy"].append(noisy[child_prompt, level])
        levels["trained"].append(steps[child_prompt, level] & (wanted > 1)[child_prompt])
        widths = wanted
    return RolloutPlan(
        prompt=tuple(levels["prompt"]),
        parent=tuple(levels["parent"]),
        noisy=tuple(levels["noisy"]),
        trained=tuple(levels["trained"]),
        start=start,
    )


def trunk_levels(plan: RolloutPlan) -> IntArray:  # (P,)
    """How many levels, from the first, each prompt has a single node at that no noise has reached.

    What the network says there depends on nothing but the prompt and its start noise. 0 for several trees, and where
    the plan says which start noise each root has.
    """
    prompts = int(plan.group.max()) + 1
    lengths: IntArray = np.zeros(prompts, dtype=np.int64)
    alone = np.full(prompts, plan.start is None)
    for level in range(plan.num_steps if plan.tail is None else plan.tail.start):
        alone &= np.bincount(plan.prompt[level], minlength=prompts) == 1
        lengths += alone
        alone[plan.prompt[level + 1][plan.noisy[level]]] = False
    return lengths


def spread(parents: int, children: int) -> IntArray:  # (children,)
    """The parent of each child: as equal numbers as possible, the larger ones evenly spaced."""
    return np.arange(children, dtype=np.int64) * parents // children
