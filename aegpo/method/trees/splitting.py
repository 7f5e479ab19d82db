"""The forest as index arrays, and trees that split as a whole: rollouts side by side, trajectories that branch.

Independent rollouts are the tree that splits only at its root. `forest` grows any tree level by level from three
decisions: how many roots, how many children each node gets, and which steps are noisy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Literal

import numpy as np
from pydantic import Field

from aegpo.core.experiment import Experiment
from aegpo.core.parts import TreeSpec
from aegpo.core.records import BoolArray, IntArray, RolloutPlan
from aegpo.method.selectors.plain import misplaced

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


def spread(parents: int, children: int) -> IntArray:  # (children,)
    """The parent of each child: as equal numbers as possible, the larger ones evenly spaced."""
    return np.arange(children, dtype=np.int64) * parents // children


class _Tree(TreeSpec):
    """What both share: which steps add noise."""

    noise: Literal["chosen", "all", "none"] = Field(
        "chosen",
        description="which steps add noise: the chosen ones (AEGPO leaves it open; our choice), all of them but for a "
        "last one that was not chosen, or none, for an objective of the forward process",
    )

    def noisy_steps(self, steps: BoolArray) -> BoolArray:  # (P, T)
        """Which denoising steps add noise."""
        if self.noise == "none":
            return np.zeros_like(steps)
        noisy = steps.copy()
        if self.noise == "all":
            noisy[:, :-1] = True
        return noisy


class IndependentTree(_Tree):
    """Rollouts that share nothing, or only their start noise (Flow-GRPO, DanceGRPO, MixGRPO).

    `batch` is DanceGRPO's init_same_noise: one start noise for all prompts of the training step (there: of a rank's
    batch). Trajectories that share it are one until the first noisy step.
    """

    kind: Literal["independent"] = "independent"
    start: Literal["own", "shared", "batch"] = Field(
        "own",
        description="each rollout starts from noise of its own, a prompt's from the same, or all of the step's",
    )

    def plan(self, counts: IntArray, steps: BoolArray, rng: np.random.Generator) -> RolloutPlan:
        """Trajectories side by side; with shared start noise they are one until the first noisy step."""
        noisy = self.noisy_steps(steps)
        if self.start == "own":
            return forest(counts, steps, noisy, lambda prompt, level, nodes: nodes)
        first = noisy.argmax(axis=1)

        def children(prompt: int, level: int, nodes: int) -> int:
            return int(counts[prompt]) if level == first[prompt] else nodes

        roots = np.ones_like(counts)
        return forest(roots, steps, noisy, children, np.zeros_like(roots) if self.start == "batch" else None)

    def problems(self, experiment: Experiment) -> Iterator[str]:
        """Rollouts that share their start need noise to differ."""
        if self.noise == "none" and self.start != "own":
            yield f"rollouts with 'start: {self.start}' and no noise would be the same image; use 'start: own'"


class BranchingTree(_Tree):
    """Trajectories that split until a prompt's leaves are reached (BranchGRPO, AEGPO).

    Every node of a prompt splits `factor` ways at each chosen step, or at each of the fixed `splits`; the last split is
    partial where the number of leaves is no power of the factor. Chosen steps after the last split stay noisy and
    trained. Where the splits are too few for the leaves, the prompt gets several trees.

    BranchGRPO: `{splits: [0, 3, 6, 9], noise: all, start: batch, split_noise: 4}` with every step chosen, and
    `std_only: true` at the sampler. Deviation: its script draws children with 4 times the noise that their
    log-probability assumes; a log-probability here is that of the noise that was added.
    """

    kind: Literal["branching"] = "branching"
    factor: int = Field(2, ge=2, le=65536, description="children of a node at a split (AEGPO and BranchGRPO: 2)")
    splits: tuple[int, ...] | None = Field(
        None, min_length=1, description="steps that split and are noisy (BranchGRPO: 0, 3, 6, 9); null: the chosen ones"
    )
    start: Literal["own", "batch"] = Field(
        "own", description="each tree starts from noise of its own, or all of the step's trees from the same"
    )
    split_noise: float = Field(
        1.0,
        gt=0,
        le=100,
        description="factor of the noise rate at splits, on the edges of siblings (BranchGRPO's script: 4, and with "
        "`std_only` at the sampler as published)",
    )

    def plan(self, counts: IntArray, steps: BoolArray, rng: np.random.Generator) -> RolloutPlan:
        """A forest that splits at `steps` or `splits`, each prompt's with exactly its `counts` leaves."""
        splits = steps
        if self.splits is not None:
            splits = np.zeros_like(steps)
            splits[:, list(self.splits)] = True
        reach = float(self.factor) ** splits.sum(axis=1)  # leaves a tree can grow; a float, for it may be astronomic
        most = np.minimum(reach, counts).astype(np.int64)
        roots: IntArray = -(-counts // most)

        def children(prompt: int, level: int, nodes: int) -> int:
            return min(nodes * self.factor, int(counts[prompt])) if splits[prompt, level] else nodes

        start = np.zeros(int(roots.sum()), dtype=np.int64) if self.start == "batch" else None
        plan = forest(roots, steps, self.noisy_steps(steps) | splits, children, start)
        if self.split_noise == 1:
            return plan
        siblings = (np.bincount(parent)[parent] > 1 for parent in plan.parent)
        return replace(plan, scale=tuple(np.where(several, self.split_noise, 1.0) for several in siblings))

    def problems(self, experiment: Experiment) -> Iterator[str]:
        """Splits that exist, and noise that tells children apart."""
        yield from misplaced("splits", self.splits or (), experiment.rollouts.denoising_steps)
        if self.noise == "none":
            yield "children of a split without noise would be the same image; 'noise' must be 'chosen' or 'all'"
