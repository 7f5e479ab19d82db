"""The forest of a training step as index arrays: every method's rollouts are trees that split somewhere else.

Independent rollouts are the tree that splits only at its root. `forest` grows any of them level by level from three
decisions: how many roots, how many children each node gets, and which steps are noisy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
from pydantic import Field

from aegpo.interfaces import BoolArray, IntArray, RolloutPlan
from aegpo.specs import TreeSpec

Children = Callable[[int, int, int], int]  # (prompt, level, nodes) -> nodes of that prompt one level further


class _Tree(TreeSpec):
    """What every tree shares: what the steps that were not chosen do."""

    elsewhere: Literal["ode", "sde"] = Field(
        "ode",
        description="steps that were not chosen are deterministic, or noisy too but for the last (AEGPO leaves it "
        "open; our choice: ode)",
    )

    def noisy_steps(self, steps: BoolArray) -> BoolArray:  # (P, T)
        """Which denoising steps add noise."""
        noisy = steps.copy()
        if self.elsewhere == "sde":
            noisy[:, :-1] = True
        return noisy


class IndependentTree(_Tree):
    """Rollouts that share nothing, or only their start noise (Flow-GRPO, DanceGRPO)."""

    kind: Literal["independent"] = "independent"
    start: Literal["own", "shared"] = Field(
        "own", description="each rollout starts from noise of its own, or a prompt's rollouts from the same"
    )

    def plan(self, counts: IntArray, steps: BoolArray, rng: np.random.Generator) -> RolloutPlan:
        """Trajectories side by side; with shared start noise they are one until the first noisy step."""
        noisy = self.noisy_steps(steps)
        if self.start == "own":
            return forest(counts, steps, noisy, lambda prompt, level, nodes: nodes)
        first = noisy.argmax(axis=1)

        def children(prompt: int, level: int, nodes: int) -> int:
            return int(counts[prompt]) if level == first[prompt] else nodes

        return forest(np.ones_like(counts), steps, noisy, children)


class BranchingTree(_Tree):
    """Trajectories that split at the chosen steps until a prompt's leaves are reached (BranchGRPO, AEGPO).

    Every node of a prompt splits `factor` ways at each chosen step; the last split is partial where the number of
    leaves is no power of the factor. Chosen steps after the last split stay noisy and trained. Where the chosen steps
    are too few for the leaves, the prompt gets several trees.
    """

    kind: Literal["branching"] = "branching"
    factor: int = Field(2, ge=2, description="children of a node at a chosen step (AEGPO and BranchGRPO: 2)")

    def plan(self, counts: IntArray, steps: BoolArray, rng: np.random.Generator) -> RolloutPlan:
        """A forest that splits at `steps`, each prompt's with exactly its `counts` leaves."""
        reach = float(self.factor) ** steps.sum(axis=1)  # leaves a tree can grow; a float, for it may be astronomic
        most = np.minimum(reach, counts).astype(np.int64)
        roots: IntArray = -(-counts // most)

        def children(prompt: int, level: int, nodes: int) -> int:
            return min(nodes * self.factor, int(counts[prompt])) if steps[prompt, level] else nodes

        return forest(roots, steps, self.noisy_steps(steps), children)


def forest(roots: IntArray, steps: BoolArray, noisy: BoolArray, children: Children) -> RolloutPlan:
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
        parent = [start + _spread(int(old), int(new)) for start, old, new in zip(starts, widths, wanted, strict=True)]
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
    )


def trunk_levels(plan: RolloutPlan) -> IntArray:  # (P,)
    """How many levels, from the first, each prompt has a single node at that no noise has reached.

    What the network says there depends on nothing but the prompt and its start noise. 0 for several trees, and where
    the plan says which start noise each root has.
    """
    prompts = int(plan.group.max()) + 1
    lengths: IntArray = np.zeros(prompts, dtype=np.int64)
    alone = np.full(prompts, plan.start is None)
    for level in range(plan.num_steps):
        alone &= np.bincount(plan.prompt[level], minlength=prompts) == 1
        lengths += alone
        alone[plan.prompt[level + 1][plan.noisy[level]]] = False
    return lengths


def _spread(parents: int, children: int) -> IntArray:  # (children,)
    """The parent of each child: as equal numbers as possible, the larger ones evenly spaced."""
    return np.arange(children, dtype=np.int64) * parents // children
