"""A plan cut into parts that are sampled apart: neighbouring rollouts, each part with every node on their way.

Rollouts are in depth-first order, since children are in the order of their parents. So an interval of rollouts needs
at each level the nodes from its first rollout's ancestor to its last one's. With d(r) = the sum over levels of the
number of r's ancestor there, rollouts a..b need d(b) - d(a) + T forwards: a part's cost is known without making it.
Nodes inside a longer step need none and are left out of both numbers.

A node on the way of several parts is sampled in each of them, from the same noise. Its edge is learned from in one: in
the part with the node's first rollout.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TypeVar

import numpy as np

from aegpo.core.records import BoolArray, FloatArray, IntArray, Prompt, RolloutPlan
from aegpo.core.steps import passing

_Array = TypeVar("_Array", BoolArray, IntArray, FloatArray)


@dataclass(frozen=True)
class PartialPlan(RolloutPlan):
    """Some neighbouring rollouts of a plan; prompts, start noises and rollouts keep their numbers of the whole."""

    whole: RolloutPlan | None = None
    rows: tuple[IntArray, ...] = ()  # T+1 arrays (N_i,): the number of each node in the whole plan

    @property
    def nodes(self) -> tuple[IntArray, ...]:
        """The number of each node in the whole plan, which its noise goes by."""
        return self.rows

    @cached_property
    def leaves(self) -> tuple[IntArray, ...]:
        """How many rollouts of the whole plan pass through each node."""
        return self._of_whole(self._origin.leaves)

    @cached_property
    def first_leaf(self) -> tuple[IntArray, ...]:
        """The lowest rollout of the whole plan below each node."""
        return self._of_whole(self._origin.first_leaf)

    @cached_property
    def trunk_levels(self) -> IntArray:
        """Those of the whole plan, for prompts of which something is here."""
        here = np.zeros(len(self._origin.trunk_levels), dtype=np.bool_)
        here[self.group] = True
        lengths: IntArray = np.where(here, self._origin.trunk_levels, 0)
        return lengths

    @property
    def _origin(self) -> RolloutPlan:
        assert self.whole is not None, "made by `part`"
        return self.whole

    def _of_whole(self, values: tuple[IntArray, ...]) -> tuple[IntArray, ...]:
        return tuple(each[rows] for each, rows in zip(values, self.rows, strict=True))


@dataclass(frozen=True)
class Partition:
    """A plan in neighbouring parts, some of which may be empty."""

    plan: RolloutPlan
    bounds: IntArray  # (S+1,) part s has the rollouts bounds[s]..bounds[s+1]-1

    @classmethod
    def of(cls, plan: RolloutPlan, parts: int, whole_groups: Sequence[Prompt] | None = None) -> Partition:
        """The parts whose dearest is as cheap as it can be.

        Args:
            plan: what is cut.
            parts: S.
            whole_groups: the prompts of the plan, if what asks the same must stay together; None: cut anywhere.
        """
        return cls(plan, cuts(plan, parts, None if whole_groups is None else undivided(plan, whole_groups)))

    @cached_property
    def ancestors(self) -> IntArray:  # (T+1, N)
        """The node of every level that each rollout passes."""
        return ancestors(self.plan)

    @property
    def rollouts(self) -> list[int]:
        """How many rollouts each part has."""
        return [int(count) for count in np.diff(self.bounds)]

    @cached_property
    def forwards(self) -> list[int]:
        """Velocity evaluations of each part; their sum is more than the plan's where parts share nodes."""
        before, after = spans(self.plan, self.ancestors)
        parts = zip(self.bounds[:-1].tolist(), self.bounds[1:].tolist(), strict=True)
        return [int(after[end - 1] - before[first]) if end > first else 0 for first, end in parts]

    @cached_property
    def parts(self) -> tuple[RolloutPlan, ...]:
        """The parts; the plan itself is the only one with rollouts, if there is one."""
        return tuple(
            self.plan if end - first == self.plan.num_rollouts else part(self.plan, first, end, self.ancestors)
            for first, end in pairwise(self.bounds.tolist())
        )

    def owner(self, level: int) -> IntArray:  # (N_level,)
        """The part that has the first rollout below each node."""
        return self._owning(self.plan.first_leaf[level])

    def owned(self, level: int, index: int) -> IntArray:
        """The nodes of a level that a part owns, in order."""
        return np.flatnonzero(self.owner(level) == index)

    def edge_owner(self) -> IntArray:  # (E,)
        """The part that each trained edge is sampled in, in the order of `Rollouts.edges`."""
        rows = [leaf[chosen] for leaf, chosen in zip(self.plan.first_leaf[1:], self.plan.trained, strict=True)]
        return self._owning(np.concatenate(rows))

    def _owning(self, rollouts: IntArray) -> IntArray:
        found: IntArray = np.searchsorted(self.bounds[1:], rollouts, side="right").astype(np.int64)
        return found


def ancestors(plan: RolloutPlan) -> IntArray:  # (T+1, N)
    """The node of every level that each rollout passes."""
    found = np.empty((plan.num_steps + 1, plan.num_rollouts), dtype=np.int64)
    found[-1] = np.arange(plan.num_rollouts)
    for level in reversed(range(plan.num_steps)):
        found[level] = plan.parent[level][found[level + 1]]
    return found


def undivided(plan: RolloutPlan, prompts: Sequence[Prompt]) -> BoolArray:  # (N,)
    """At which rollouts a part may begin if those of what is asked stay together, also where it is asked twice."""
    first = {prompt.asked: row for row, prompt in reversed(list(enumerate(prompts)))}
    asked = np.array([first[prompt.asked] for prompt in prompts], dtype=np.int64)[plan.group]
    begins, seen = np.ones(len(asked), dtype=np.bool_), 0
    last = {int(one): int(at) for at, one in enumerate(asked)}
    for row, one in enumerate(asked.tolist()):
        begins[row] = row >= seen
        seen = max(seen, last[one] + 1)
    return begins


def spans(plan: RolloutPlan, above: IntArray) -> tuple[IntArray, IntArray]:  # (N,), (N,)
    """Forwards before a rollout's way and up to its end, summed over levels: rollouts a..b need after[b] - before[a].

    Args:
        plan: in depth-first order.
        above: its `ancestors`.
    """
    before, after = np.zeros((2, plan.num_rollouts), dtype=np.int64)
    for through, nodes in zip(passing(plan), above[:-1], strict=True):
        asked = ~through
        number = np.cumsum(asked)
        after += number[nodes]
        before += (number - asked)[nodes]
    return before, after


def cuts(plan: RolloutPlan, parts: int, may_begin: BoolArray | None = None) -> IntArray:  # (parts+1,)
    """Where rollouts are cut into neighbouring parts so that the dearest part costs as little as it can.

    A part costs more the longer it is. So a limit can be kept if and only if parts that are filled up to it one after
    another are enough, and the least such limit is found by halving. Within it cuts are as even as they can be, so that
    several neighbouring parts together are no dearer than they must be either.

    With F forwards of the plan, U of the dearest piece that is not cut and w of the cheapest way of a rollout, the
    dearest part costs at most U + (F - w)/S; where parts may begin anywhere and no steps are joined, T + (F - T)/S. For
    if S parts up to a limit L were too few, each with the piece behind it would cost more than L, and all these
    together at most F - w + S U.

    Args:
        plan: in depth-first order.
        parts: S; some are empty if and only if there are fewer pieces.
        may_begin: (N,) the rollouts at which a part may begin; the first must. None: all.
    """
    before, after = spans(plan, ancestors(plan))
    begins = np.arange(plan.num_rollouts) if may_begin is None else np.flatnonzero(may_begin)
    ends = np.append(begins[1:], plan.num_rollouts)
    first, last = before[begins].tolist(), after[ends - 1].tolist()  # pieces a..b cost last[b] - first[a]

    def enough(limit: int) -> bool:
        """True if so many parts that cost no more than a limit each have all pieces."""
        piece = 0
        for _ in range(parts):
            piece = bisect_right(last, first[piece] + limit)
            if piece == len(begins):
                return True
        return False

    dearest = max(end - begin for begin, end in zip(first, last, strict=True))
    limit = bisect_left(range(last[-1] - first[0]), True, lo=dearest, key=enough)
    chosen = _even(first, last, parts, limit)
    return np.append(begins, plan.num_rollouts)[chosen]


def _even(first: list[int], last: list[int], parts: int, limit: int) -> list[int]:
    """The pieces at which parts begin that keep a limit, each as near as it can to its share of all before it.

    Pieces a..b cost last[b] - first[a]; the limit can be kept. A part has a piece at least if there are as many as
    parts, else one at most.
    """
    pieces = len(first)
    fewest, most = (1, pieces) if pieces >= parts else (0, 1)
    latest = [pieces]  # from the last part on: where it begins at the earliest if it and those behind it have the rest
    while len(latest) < parts:
        end = latest[-1]
        latest.append(bisect_left(first, last[end - 1] - limit) if end else 0)
    chosen = [0]
    for index, needed in enumerate(reversed(latest), start=1):
        ahead = parts - index
        reach = bisect_right(last, first[chosen[-1]] + limit) if chosen[-1] < pieces else pieces
        low = max(needed, chosen[-1] + fewest, pieces - most * ahead)
        high = min(reach, chosen[-1] + most, pieces - fewest * ahead)
        share = first[0] + (last[-1] - first[0]) * index / parts
        near = bisect_left(last, share)  # of the places to cut on either side of the share, the nearer one
        near += near < pieces and last[near] - share <= share - (last[near - 1] if near else first[0])
        chosen.append(min(max(near, low), high))
    return chosen


def part(plan: RolloutPlan, first: int, end: int, above: IntArray | None = None) -> PartialPlan:
    """Rollouts first..end-1 of a plan and every node on their way; edges that earlier ones pass too are theirs.

    `above`: the plan's `ancestors`, if they are known.
    """
    above = ancestors(plan) if above is None else above
    rows = tuple(
        np.arange(level[first], level[end - 1] + 1) if end > first else np.zeros(0, dtype=np.int64) for level in above
    )
    edges = zip(rows, rows[1:], plan.parent, strict=False)
    learned = zip(rows[1:], plan.trained, plan.first_leaf[1:], strict=True)
    return PartialPlan(
        prompt=_taken(plan.prompt, rows),
        parent=tuple(parent[row] - (upper[0] if len(upper) else 0) for upper, row, parent in edges),
        noisy=_taken(plan.noisy, rows[1:]),
        trained=tuple(trained[row] & (leaf[row] >= first) for row, trained, leaf in learned),
        start=rows[0] if plan.start is None else plan.start[rows[0]],
        tail=plan.tail,
        scale=None if plan.scale is None else _taken(plan.scale, rows[1:]),
        until=None if plan.until is None else _taken(plan.until, rows[1:]),
        whole=plan,
        rows=rows,
    )


def _taken(values: Sequence[_Array], rows: Sequence[IntArray]) -> tuple[_Array, ...]:
    return tuple(each[row] for each, row in zip(values, rows, strict=True))
