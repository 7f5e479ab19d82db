"""What is done at which nodes of a plan: index arrays, on the host and on the device, which is told once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from aegpo.core.records import BoolArray, IntArray, RolloutPlan
from aegpo.core.signals import Trunk
from aegpo.core.steps import passing
from aegpo.method.trained_edges import TrainedEdges

_ASKED = -1  # in place of a row of the trunk: the network says the velocity


@dataclass(frozen=True)
class Some:
    """Some nodes of a level, and a number for each."""

    nodes: IntArray  # (n,) rising
    places: Tensor  # (n,) int64, the same on the device
    numbers: Tensor  # (n,) int64

    def within(self, nodes: slice) -> slice:
        """Which of them are among some nodes."""
        return slice(*np.searchsorted(self.nodes, [nodes.start, nodes.stop]).tolist())

    def among(self, nodes: slice) -> tuple[Tensor, Tensor]:  # (k,), (k,)
        """Those among some nodes: which of these, and their numbers."""
        those = self.within(nodes)
        return self.places[those] - nodes.start, self.numbers[those]


@dataclass(frozen=True)
class Places:
    """A plan's nodes by what is done at them, level by level."""

    through: tuple[BoolArray, ...]  # T arrays (N_i,): passes through
    plain: Sequence[Some]  # T: asked, without a graph; the numbers are prompts
    kept: Sequence[Some]  # T: asked, with one
    trunk: Sequence[Some]  # T: the trunk knows the velocity, in this row
    noisy: Sequence[Some]  # T: reached with noise, at level + 1; the numbers are parents
    stored: Sequence[Some]  # T+1: the state is learned from, and has this number
    begins: Sequence[Some]  # T: an edge that is learned from begins here
    parent: Sequence[Tensor]  # T tensors (N_{i+1},)

    @classmethod
    def of(
        cls,
        plan: RolloutPlan,
        known: TrainedEdges,
        device: torch.device,
        trunk: Trunk | None = None,
        keep: Sequence[BoolArray] | None = None,
    ) -> Places:
        """Those of a plan.

        Args:
            plan: what is executed.
            known: its trained edges.
            device: where.
            trunk: what knows some velocities.
            keep: T arrays (N_i,), the nodes whose graphs are wanted; None: none.
        """
        rows, through, prompt = trunk_rows(plan, trunk), passing(plan), plan.prompt[:-1]
        asked = [row == _ASKED for row in rows]
        wanted = keep or [np.zeros(len(nodes), dtype=np.bool_) for nodes in prompt]
        kinds = [
            [
                (ask & ~still & ~kept, each)
                for ask, still, kept, each in zip(asked, through, wanted, prompt, strict=True)
            ],
            [
                (ask & ~still & kept, each)
                for ask, still, kept, each in zip(asked, through, wanted, prompt, strict=True)
            ],
            [((row != _ASKED) & ~still, row) for row, still in zip(rows, through, strict=True)],
            list(zip(plan.noisy, plan.parent, strict=True)),
            [(number >= 0, number) for number in known.number],
            [((number >= 0) & (number < known.begins), number) for number in known.number[:-1]],
        ]
        (plain, kept, by_trunk, noisy, stored, begins), parent = _moved(kinds, plan.parent, device)
        return cls(through, plain, kept, by_trunk, noisy, stored, begins, parent)


def asked_nodes(plan: RolloutPlan, trunk: Trunk | None) -> list[BoolArray]:  # (N_i,) of each level
    """The nodes whose velocity no trunk knows; those that pass through are among them, and need none."""
    return [rows == _ASKED for rows in trunk_rows(plan, trunk)]


def trunk_rows(plan: RolloutPlan, trunk: Trunk | None) -> list[IntArray]:  # (N_i,) of each level
    """The row of the trunk that knows the velocity of each node; -1 where none does."""
    if trunk is None:
        return [np.full(len(nodes), _ASKED) for nodes in plan.prompt[:-1]]
    levels = trunk.levels(plan)
    return [on_trunk(plan, trunk, levels > level, level) for level in range(plan.num_steps)]


def on_trunk(plan: RolloutPlan, trunk: Trunk, chosen: BoolArray, level: int) -> IntArray:  # (N_i,)
    """The row of the trunk, among the `chosen` (K,), of each prompt that has a single node at a level; else -1."""
    found = np.full(len(plan.prompt[level]), _ASKED, dtype=np.int64)
    for row in np.flatnonzero(chosen):
        found[plan.prompt[level] == trunk.prompt[row]] = row
    return found


def on_device(arrays: Sequence[IntArray], device: torch.device) -> list[Tensor]:
    """Arrays as tensors; all of them go there in one transfer, for which the device is waited for once."""
    together = torch.from_numpy(np.concatenate([*arrays, np.zeros(0, dtype=np.int64)])).to(device)
    return list(torch.split(together, [*(len(each) for each in arrays), 0])[:-1])


def _moved(
    kinds: Sequence[Sequence[tuple[BoolArray, IntArray]]], others: Sequence[IntArray], device: torch.device
) -> tuple[list[list[Some]], list[Tensor]]:
    """Nodes and numbers of each kind, level by level, and other arrays."""
    nodes = [[np.flatnonzero(which) for which, _ in levels] for levels in kinds]
    numbers = [
        [values[rows] for rows, (_, values) in zip(chosen, levels, strict=True)]
        for chosen, levels in zip(nodes, kinds, strict=True)
    ]
    flat = [each for levels in (*nodes, *numbers) for each in levels]
    there = iter(on_device([*flat, *others], device))
    places = [[next(there) for _ in levels] for levels in nodes]
    found = [
        [Some(rows, place, next(there)) for rows, place in zip(*each, strict=True)]
        for each in zip(nodes, places, strict=True)
    ]
    return found, list(there)
