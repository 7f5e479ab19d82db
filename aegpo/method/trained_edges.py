"""The trained edges of a plan as arrays, and the states they lie between, each of which is there once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from aegpo.core.records import BoolArray, FloatArray, IntArray, RolloutPlan

_Array = TypeVar("_Array", BoolArray, IntArray, FloatArray)


@dataclass(frozen=True)
class TrainedEdges:
    """The trained edges of a plan, level by level in the order of their nodes.

    Siblings begin at one state, and a rollout's next trained step begins where the last one ended. So states have
    numbers: first those where edges begin, level by level in the order of their nodes, then the others.
    """

    level: IntArray  # (E,) the denoising step
    prompt: IntArray  # (E,)
    rollout: IntArray  # (E,) the rollout the edge is booked on
    leaves: IntArray  # (E,) rollouts that pass through it
    begin: IntArray  # (E,) the state before the step; never falls
    end: IntArray  # (E,) the state after it
    begins: int  # V, the states where edges begin
    states: int  # S, all of them
    until: IntArray | None  # (E,) the level the step ends at; None: the next
    scale: FloatArray | None  # (E,) factor of the step's noise rate; None: 1
    number: tuple[IntArray, ...]  # T+1 arrays (N_i,): the number of each node's state; -1 where no edge needs it

    @classmethod
    def of(cls, plan: RolloutPlan) -> TrainedEdges:
        """Those of a plan."""
        rows = [np.flatnonzero(trained) for trained in plan.trained]

        def picked(values: Sequence[_Array]) -> _Array:
            return np.concatenate([each[row] for each, row in zip(values, rows, strict=True)])

        number, begins, states = _numbers(plan)
        above = [numbers[parent] for numbers, parent in zip(number, plan.parent, strict=False)]
        return cls(
            level=picked([np.full(len(each), level, dtype=np.int64) for level, each in enumerate(plan.trained)]),
            prompt=picked(plan.prompt[1:]),
            rollout=picked(plan.first_leaf[1:]),
            leaves=picked(plan.leaves[1:]),
            begin=picked(above),
            end=picked(number[1:]),
            begins=begins,
            states=states,
            until=None if plan.until is None else picked(plan.until),
            scale=None if plan.scale is None else picked(plan.scale),
            number=number,
        )

    def __len__(self) -> int:
        return len(self.level)

    @property
    def group(self) -> IntArray:  # (E,)
        """The group of each edge: those of one prompt at one denoising step; counted from 0, level by level."""
        number: IntArray = np.unique(np.stack([self.level, self.prompt]), axis=1, return_inverse=True)[1]
        return number.ravel()


def _numbers(plan: RolloutPlan) -> tuple[tuple[IntArray, ...], int, int]:
    """The number of every node's state, how many states edges begin at, and how many there are."""
    number = tuple(np.full(len(nodes), -1, dtype=np.int64) for nodes in plan.prompt)
    begins = states = 0
    for level, (parent, trained) in enumerate(zip(plan.parent, plan.trained, strict=True)):
        above = np.unique(parent[trained])
        number[level][above] = np.arange(begins, begins + len(above))
        begins += len(above)
    states = begins
    for numbers, trained in zip(number[1:], plan.trained, strict=True):
        ends = np.flatnonzero(trained & (numbers < 0))
        numbers[ends] = np.arange(states, states + len(ends))
        states += len(ends)
    return number, begins, states
