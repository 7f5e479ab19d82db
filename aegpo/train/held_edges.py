"""The trained edges of a step: their table is known to every process, their states to the one that sampled them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from aegpo.core.records import Edges, IntArray
from aegpo.method.partition import Partition
from aegpo.parallel.team import Team
from aegpo.train.edges import STATES, columns, joined


@dataclass(frozen=True)
class Portion:
    """What one shard learns from in one optimizer step."""

    edges: Edges
    rows: Tensor  # (B,) int64, which of `edges`
    _place: Tensor | None = None  # (len(edges),) int64, where they are in the table; None: they are the table

    def of(self, values: Tensor) -> Tensor:
        """Values (E,) of the table for each of `edges`."""
        return values if self._place is None else values[self._place]


class HeldEdges:
    """All trained edges of a training step, dealt out anew for every optimizer step.

    Each shard gets as many of an optimizer step's edges as any other, give or take one, whoever sampled them; its edges
    are neighbours in the order of their rollouts, so that few states have to be sent.
    """

    def __init__(self, team: Team, partition: Partition, table: Edges, own: Sequence[Edges]) -> None:
        """`own`: the edges of each of this process's parts."""
        self._team, self.table = team, table
        if team.shards == 1:
            self.table, self._own = own[0], own[0]
            return
        owner = partition.edge_owner()
        self._own = joined(own) if len(own) > 1 else own[0]
        self._holder = np.array([rank for rank in range(team.size) for _ in team.of(rank)], dtype=np.int64)[owner]
        order = np.argsort(owner, kind="stable")  # how processes hold them: shard by shard
        self._place = np.empty(len(owner), dtype=np.int64)
        begins = np.searchsorted(self._holder[order], self._holder[order])
        self._place[order] = np.arange(len(order)) - begins

    def portions(self, rows: Tensor, whole_groups: bool) -> dict[int, Portion]:
        """The edges `rows` (B,) of the table, dealt to shards; those of this process that got any.

        `whole_groups`: those of a group stay together.
        """
        if self._team.shards == 1:
            return {0: Portion(self.table, rows)}
        dealt = self._dealt(rows.cpu().numpy(), whole_groups)
        wanted = [np.concatenate([dealt[shard] for shard in self._team.of(rank)]) for rank in range(self._team.size)]
        states = {name: value for name, value in columns(self._own).items() if name in STATES}
        found = self._team.moved("update", list(states.values()), self._holder, self._place, wanted)
        mine = [dealt[shard] for shard in self._team.mine]
        cut = [torch.split(each, [len(rows) for rows in mine]) for each in found]
        return {
            shard: self._portion(dealt[shard], dict(zip(states, each, strict=True)))
            for shard, *each in zip(self._team.mine, *cut, strict=True)
            if len(dealt[shard])
        }

    def _dealt(self, rows: IntArray, whole_groups: bool) -> list[IntArray]:
        rollout = self.table.rollout.cpu().numpy()[rows]
        if not whole_groups:
            neighbours = rows[np.argsort(rollout, kind="stable")]
            return [np.sort(each) for each in np.array_split(neighbours, self._team.shards)]
        group = self.table.group.cpu().numpy()[rows]
        _, first, which, sizes = np.unique(group, return_index=True, return_inverse=True, return_counts=True)
        order = np.argsort(rollout[first], kind="stable")
        middle = np.cumsum(sizes[order]) - sizes[order] / 2  # of each group, when all stand in a row
        shard = np.empty(len(sizes), dtype=np.int64)
        shard[order] = middle * self._team.shards / len(rows)
        return [rows[shard[which] == each] for each in range(self._team.shards)]

    def _portion(self, place: IntArray, states: Mapping[str, Tensor]) -> Portion:
        """The edges at some places of the table, with their states."""
        device = self.table.level.device
        chosen = torch.from_numpy(place).to(device)
        known = {name: value[chosen] for name, value in columns(self.table).items()}
        return Portion(Edges(**{**known, **states}), torch.arange(len(place), device=device), chosen)
