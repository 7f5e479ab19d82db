"""TempFlow-GRPO's tree: deterministic trunks, each state of which has children of its own."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from aegpo.core.parts import TreeSpec
from aegpo.core.records import BoolArray, IntArray, RolloutPlan
from aegpo.errors import PlanError
from aegpo.method.trees.splitting import spread

LEAST = 2  # children of a step, to be compared


class TrunkTree(TreeSpec):
    """Children at each chosen state of deterministic trunks (TempFlow-GRPO).

    A child's first edge is noisy and trained, the rest of its way to the image is deterministic, so its reward is that
    edge's own: combine it with `advantage: process`. A prompt's rollouts are shared out over the chosen steps as
    equally as possible, earlier steps first, and those of a step over the trunks; every step needs 2 to compare.
    TempFlow-GRPO has 6 children at each of the first T - 1 states, so 54 rollouts for each trunk of 10 steps. A trunk
    ends at its last state with children.
    """

    kind: Literal["trunk"] = "trunk"
    trunks: int = Field(
        1, ge=1, le=65536, description="deterministic trajectories of a prompt (TempFlow-GRPO: 4 seeds)"
    )

    def plan(self, counts: IntArray, steps: BoolArray, rng: np.random.Generator) -> RolloutPlan:
        """One or more trunks a prompt, each prompt's with exactly its `counts` leaves.

        Raises:
            PlanError: if a prompt has too few rollouts for its chosen steps.
        """
        for prompt, (count, chosen) in enumerate(zip(counts, steps.sum(axis=1), strict=True)):
            least = int(chosen) * max(LEAST, self.trunks)
            if count < least:
                raise PlanError(
                    f"tree 'trunk' cannot share {count} rollouts of prompt {prompt} out over {chosen} steps of "
                    f"{self.trunks} trunks, {max(LEAST, self.trunks)} a step; give each prompt at least "
                    f"{least}, or choose at most {int(count) // max(LEAST, self.trunks)} steps"
                )
        children = [_children(int(count), chosen, self.trunks) for count, chosen in zip(counts, steps, strict=True)]
        return _grown(children, self.trunks)


def _children(count: int, chosen: BoolArray, trunks: int) -> IntArray:  # (T, trunks)
    """How many children each state of each trunk has; they add up to `count`."""
    found = np.zeros((len(chosen), trunks), dtype=np.int64)
    levels = np.flatnonzero(chosen)
    for position, level in enumerate(levels):
        share = count // len(levels) + (position < count % len(levels))
        found[level] = np.bincount(spread(trunks, share), minlength=trunks)
    return found


def _grown(children: list[IntArray], trunks: int) -> RolloutPlan:
    """The plan of every prompt's children; nodes of one prompt stay together, in the order of their parents.

    Nodes are (prompt, trunk); a node of trunk -1 is on its way to an image.
    """
    level_nodes = [(prompt, trunk) for prompt in range(len(children)) for trunk in range(trunks)]
    prompts, parents, noisy = [[prompt for prompt, _ in level_nodes]], [], []
    for level in range(len(children[0])):
        following: list[tuple[int, int]] = []
        parent: list[int] = []
        fresh: list[bool] = []
        for index, (prompt, trunk) in enumerate(level_nodes):
            ahead = trunk < 0 or bool(children[prompt][level + 1 :, trunk].any())
            branches = 0 if trunk < 0 else int(children[prompt][level, trunk])
            following += [(prompt, trunk)] * ahead + [(prompt, -1)] * branches
            fresh += [False] * ahead + [True] * branches
            parent += [index] * (ahead + branches)
        level_nodes = following
        prompts.append([prompt for prompt, _ in level_nodes])
        parents.append(np.array(parent, dtype=np.int64))
        noisy.append(np.array(fresh, dtype=np.bool_))
    every = tuple(np.array(nodes, dtype=np.int64) for nodes in prompts)
    return RolloutPlan(every, tuple(parents), tuple(noisy), tuple(fresh.copy() for fresh in noisy))
