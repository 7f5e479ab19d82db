"""The trained edges of a step: their table is known to every process, their states to the one that sampled them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from aegpo.core.records import BoolArray, Conditioning, Edges, IntArray, RolloutPlan
from aegpo.method.partition import Partition
from aegpo.method.trained_edges import TrainedEdges
from aegpo.parallel.team import Team
from aegpo.train.micro_batches import MicroBatch
from aegpo.train.places import on_device
from aegpo.train.replay import Batch
from aegpo.train.retained import Retained

_HELD = ("states", "velocity", "base_velocity")  # what is not of the plan; the last two of states where edges begin


@dataclass(frozen=True)
class Portion:
    """What one shard learns from in one optimizer step."""

    edges: Edges
    rows: IntArray  # (B,) which of `edges`, rising
    begin: IntArray  # (len(edges),) the state where each of `edges` begins; never falls
    group: IntArray  # (len(edges),)
    place: Tensor | None = None  # (len(edges),) int64, where they are in the table; None: they are the table

    def of(self, values: Tensor) -> Tensor:
        """Values (E,) of the table for each of `edges`."""
        return values if self.place is None else values[self.place]


class HeldEdges:
    """All trained edges of a training step, dealt out anew for every optimizer step.

    Each shard evaluates the network at as many states as any other, give or take one, whoever sampled them; its edges
    are neighbours in the order of their rollouts, so that few states have to be sent.
    """

    def __init__(
        self, team: Team, partition: Partition, table: Edges, own: Sequence[Edges], renoised: bool = False
    ) -> None:
        """What is held where.

        Args:
            team: the processes.
            partition: of the plan that was sampled.
            table: all edges; their states may be elsewhere.
            own: the edges of each of this process's parts.
            renoised: they are clean latents that were noised again, each edge with a state of its own to begin at.
        """
        self._team, self._own, self._owner = team, own, partition.edge_owner()
        self.table = own[0] if team.shards == 1 else table
        self._known = known = _known(partition.plan, renoised)
        if team.shards == 1:
            return
        self._parts = [_known(part, renoised) for part in partition.parts]
        numbers = [self._numbers(partition, shard, renoised) for shard in range(team.shards)]
        begins = [each[: part.begins] for each, part in zip(numbers, self._parts, strict=True)]
        self._states, self._begins = _Holders(team, known.states, numbers), _Holders(team, known.begins, begins)

    @property
    def rollout(self) -> IntArray:  # (E,)
        """The rollout that each edge of the table is booked on."""
        return self._known.rollout

    def numbered(self, shard: int, retained: Sequence[Retained]) -> list[tuple[Retained, IntArray]]:
        """What sampling a part retained, level by level, with the numbers of its states there."""
        known = self._known if self._team.shards == 1 else self._parts[shard]
        ordered = sorted(retained, key=lambda batch: (batch.level, int(batch.nodes[0])))
        return [(batch, known.number[batch.level][batch.nodes]) for batch in ordered]

    def portions(self, rows: IntArray, whole_groups: bool) -> dict[int, Portion]:
        """The edges `rows` (B,) of the table, dealt to shards; those of this process that got any.

        `whole_groups`: those of a group stay together.
        """
        if self._team.shards == 1:
            return {0: Portion(self.table, rows, self._known.begin, self._known.group)}
        dealt = self._dealt(rows, whole_groups)
        begins = [np.unique(self._known.begin[each]) for each in dealt]
        others = [
            np.setdiff1d(self._known.end[each], first, assume_unique=True)
            for each, first in zip(dealt, begins, strict=True)
        ]
        wanted = [np.concatenate(each) for each in zip(begins, others, strict=True)]
        found = {"states": self._states.moved("states", [each.states for each in self._own], wanted)}
        for name in _HELD[1:]:
            held = [getattr(each, name) for each in self._own]
            if held[0] is not None:
                found[name] = self._begins.moved(name, held, begins)
        return {
            shard: self._portion(dealt[shard], wanted[shard], {name: each[index] for name, each in found.items()})
            for index, shard in enumerate(self._team.mine)
            if len(dealt[shard])
        }

    def kept(self, rows: IntArray) -> dict[int, Portion]:
        """The same edges, each left where it was sampled."""
        if self._team.shards == 1:
            return self.portions(rows, whole_groups=False)
        found = dict[int, Portion]()
        for shard, edges in zip(self._team.mine, self._own, strict=True):
            mine, known = np.flatnonzero(self._owner == shard), self._parts[shard]
            here = np.flatnonzero(np.isin(mine, rows))
            if len(here):
                place = on_device([mine], edges.level.device)[0]
                found[shard] = Portion(edges, here, known.begin, known.group, place)
        return found

    def _numbers(self, partition: Partition, shard: int, renoised: bool) -> IntArray:
        """The numbers in the whole plan of a part's states, in the order in which it has them."""
        part, known = partition.parts[shard], self._parts[shard]
        if renoised:
            edges, rollouts = np.flatnonzero(self._owner == shard), part.nodes[-1]
            return np.concatenate([edges, len(self._owner) + rollouts]) if len(edges) else edges
        found = np.empty(known.states, dtype=np.int64)
        for own, whole, nodes in zip(known.number, self._known.number, part.nodes, strict=True):
            there = own >= 0
            found[own[there]] = whole[nodes[there]]
        return found

    def _dealt(self, rows: IntArray, whole_groups: bool) -> list[IntArray]:
        """Pieces that stay together are taken in the order of their rollouts; each goes where its middle lies."""
        piece = (self._known.group if whole_groups else self._known.begin)[rows]
        rollout = self._known.rollout[rows]
        _, first, which = np.unique(piece, return_index=True, return_inverse=True)
        begin = self._known.begin[rows]
        evaluated = np.bincount(which, weights=np.diff(begin, prepend=-1) != 0).astype(np.int64)  # states of a piece
        order = np.lexsort((first, rollout[first]))
        middle = np.cumsum(evaluated[order]) - evaluated[order] / 2  # of each piece, when all stand in a row
        shard = np.empty(len(order), dtype=np.int64)
        shard[order] = middle * self._team.shards / evaluated.sum()
        return [rows[shard[which] == each] for each in range(self._team.shards)]

    def _portion(self, place: IntArray, states: IntArray, held: dict[str, Tensor]) -> Portion:
        """The edges at some places of the table, and the states that they lie between, by their numbers."""
        begin, end = (_places(states, numbers[place]) for numbers in (self._known.begin, self._known.end))
        chosen, starts, ends = on_device([place, begin, end], self.table.level.device)
        columns = {each.name: getattr(self.table, each.name) for each in fields(self.table) if each.name not in _HELD}
        rest = {name: value[chosen] for name, value in columns.items() if value is not None}
        edges = Edges(**{**rest, **held, "begin": starts, "end": ends})
        return Portion(edges, np.arange(len(place)), begin, self._known.group[place], chosen)


@dataclass(frozen=True)
class Lesson:
    """What a training step learns from."""

    held: HeldEdges
    credit: Tensor  # (E,) float32
    cond: Conditioning
    kept: BoolArray  # (E,) the edges that are learned from, at least one
    share: Tensor  # (E,) float32, of the step's loss
    std: float  # of Batch

    def batch(self, portion: Portion, micro: MicroBatch) -> Batch:
        """Some edges of a portion and what belongs to them."""
        return Batch(portion.edges, portion.of(self.credit), self.cond, micro, self.std)


class _Holders:
    """Where the rows of a table are: in the first shard that has each."""

    def __init__(self, team: Team, count: int, numbers: Sequence[IntArray]) -> None:
        """`numbers`: the rows that each shard has, in its order; all `count` of them are somewhere."""
        self._team = team
        self._holder, self._place = np.full(count, -1, dtype=np.int64), np.empty(count, dtype=np.int64)
        for rank in range(team.size):
            held = np.concatenate([*(numbers[shard] for shard in team.of(rank)), np.zeros(0, dtype=np.int64)])
            rows, first = np.unique(held, return_index=True)
            new = self._holder[rows] < 0
            self._holder[rows[new]], self._place[rows[new]] = rank, first[new]

    def moved(self, where: str, own: Sequence[Tensor], wanted: Sequence[IntArray]) -> list[Tensor]:
        """The rows that each of this process's shards wants; `own`: what each of them has, `wanted`: of all shards."""
        team = self._team
        together = torch.cat(list(own)) if len(own) > 1 else own[0]
        asked = [np.concatenate([wanted[shard] for shard in team.of(rank)]) for rank in range(team.size)]
        (found,) = team.moved(f"update, {where}", [together], self._holder, self._place, asked)
        return list(torch.split(found, [len(wanted[shard]) for shard in team.mine]))


def _known(plan: RolloutPlan, renoised: bool) -> TrainedEdges:
    """The trained edges of a plan as they are learned from."""
    known = TrainedEdges.of(plan)
    if not renoised:
        return known
    count, first = len(known), int(plan.nodes[-1][0]) if plan.num_rollouts else 0
    end = count + known.rollout - first
    return replace(known, begin=np.arange(count), end=end, begins=count, states=count + plan.num_rollouts)


def _places(numbers: IntArray, wanted: IntArray) -> IntArray:
    """At which place of (n,) numbers, each of which is there once, those wanted are."""
    order = np.argsort(numbers)
    places: IntArray = order[np.searchsorted(numbers, wanted, sorter=order)]
    return places
