"""Graphs kept while sampling, so that what the first optimizer step trains goes through the network once.

The policy does not change between sampling and the first optimizer step, so the forward that sampled is the one to
learn from (the idea is LeanGRPO's). Kept states go through the network in batches of their own, of at most as many as
a training batch has. Where memory ends, such a batch is sampled without its graph and evaluated again as it is: what is
learned does not depend on how much memory there was, on devices that compute the same with and without a gradient; a
CPU does, as tests show. Where memory that seemed free is not, while sampling or in an update, all graphs are dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from aegpo.core.memory import free_bytes, is_shortage, keep_freed_memory
from aegpo.core.processes import Place
from aegpo.core.records import BoolArray, IntArray, RolloutPlan
from aegpo.core.sections import GIB
from aegpo.parallel.dtensors import local

_SHARE = 0.5  # of the memory that is free at the start of a step, where the user says nothing
_T = TypeVar("_T")
_FEW = 8  # the share of a batch below which fewer states hardly cost less


@dataclass
class Retained:
    """States of a level that go through the network together, while sampling and in the first optimizer step."""

    level: int
    nodes: IntArray  # (b,) of the part that was sampled, rising
    velocity: Tensor | None  # (b, *x) float32 with its graph; None: to be evaluated again


class Retention:
    """What one part of a plan keeps while it is sampled."""

    def __init__(self, room: Room, chosen: Sequence[BoolArray], most: int) -> None:
        """`chosen`: T arrays (N_i,), the nodes to keep; `most`: of them at a time."""
        self.room, self._chosen, self.most = room, chosen, most
        self.batches: list[Retained] = []
        room.holders.append(self)

    def worthwhile(self, asked: Sequence[BoolArray], sizes: Sequence[IntArray], together: int) -> list[BoolArray]:
        """The nodes (N_i,) of T levels whose graphs are worth a batch of their own.

        Those about which the network is not asked have none, and of the nodes that would go through it together a few
        are dearer alone than evaluated again with others.

        Args:
            asked: T arrays (N_i,), about which nodes the network is asked.
            sizes: of T levels, how many neighbours go on together.
            together: about how many of them the network is asked at once, at most.
        """
        found = []
        for chosen, ask, size in zip(self._chosen, asked, sizes, strict=False):
            batch = np.repeat(np.arange(len(size)), size)
            wanted = chosen & ask
            found.append(wanted & (np.bincount(batch[wanted], minlength=len(size))[batch] * _FEW >= together))
        return found

    def evaluate(self, level: int, nodes: IntArray, ask: Callable[[], Tensor]) -> Tensor:  # (b, *x)
        """What the network says at a batch of nodes, without its graph, which is kept where there is room."""
        velocity = self.room.spared(partial(self._asked, len(nodes), ask))
        self.batches.append(Retained(level, nodes, velocity if velocity.requires_grad else None))
        return velocity.detach()

    def _asked(self, count: int, ask: Callable[[], Tensor]) -> Tensor:
        """What `ask` says of so many states, with its graph where there is room for one."""
        if not self.room.has(count):
            return ask()
        with torch.enable_grad():
            return self.room.measured(count, ask)

    def drop(self) -> None:
        """Lets go of every graph; the same batches are evaluated again."""
        for each in self.batches:
            each.velocity = None


Keeping = Callable[[RolloutPlan], Retention]  # of each part of a plan


class Room:
    """Memory for graphs: how much there is, and how much a state takes, which is known once one was kept."""

    def __init__(self, network: nn.Module, device: torch.device, gib: float | str, where: Place) -> None:
        """Room for graphs on a device.

        Args:
            network: whose weights, which graphs refer to, are there anyway.
            device: where it computes.
            gib: the limit of this process, or in words: a share of what is free when a step begins.
            where: the process, which shares the memory of a CPU with the run's others on its machine.
        """
        self._network, self._device, self._gib = network, device, gib
        self._processes = where.local_size if device.type == "cpu" else 1
        self._each: float | None = None  # bytes of a state
        self._share: float | None = None
        self._left, self._part = 0.0, _SHARE
        self.holders: list[Retention] = []  # of graphs of this step
        if device.type == "cpu" and gib != "never":
            keep_freed_memory()

    def refill(self) -> None:
        """A new step begins: no graph is kept any more."""
        self.holders.clear()
        if not isinstance(self._gib, str):
            self._left = self._gib * GIB
            return
        if self._device.type == "cuda" or self._share is None:  # on a CPU this process keeps what it had before
            self._share = self._part * free_bytes(self._device) / self._processes
        self._left = self._share

    def has(self, count: int) -> bool:
        """True if so many states fit; the first ones are tried, for only then it is known what they take."""
        return self._left > 0 and (self._each is None or count * self._each <= self._left)

    def spared(self, work: Callable[[], _T]) -> _T:
        """What `work` returns; where memory ends, it is done once more without the graphs that were kept by then.

        Nothing more is kept in this step then, and half as much as before in those that follow.

        Raises:
            Exception: that memory ended, if the limit is the user's or no graph can be dropped any more.
        """
        try:
            return work()
        except Exception as error:
            if not is_shortage(error) or self._gib != "auto" or not self.holders:
                raise
        self._give_back()  # outside of the handler, whose traceback holds what was computed
        return work()

    def _give_back(self) -> None:
        self._left, self._part, self._share = 0.0, self._part / 2, None
        for holder in self.holders:
            holder.drop()
        self.holders.clear()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def measured(self, count: int, ask: Callable[[], Tensor]) -> Tensor:
        """What `ask` says of so many states; books the graph that this leaves behind, if it leaves any."""
        if not torch.is_grad_enabled():
            return ask()
        if self._each is None:
            velocity, taken = saved_bytes(self._network, ask)
            self._each = taken / count
            if taken > self._left:
                velocity = velocity.detach()  # it was one too many
        else:
            velocity = ask()
        self._left -= count * self._each
        return velocity


def saved_bytes(network: nn.Module, ask: Callable[[], Tensor]) -> tuple[Tensor, int]:
    """What `ask` says, and the bytes that its graph keeps for the backward pass beside the network's weights."""
    weights = {local(each).untyped_storage().data_ptr() for each in (*network.parameters(), *network.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        gathered = isinstance(tensor if tensor._base is None else tensor._base, nn.Parameter)
        if storage.data_ptr() not in weights and not gathered:
            kept[storage.data_ptr()] = storage.nbytes()
        # itself would be a cycle wherever a graph keeps what it returned
        return tensor if tensor.is_leaf else tensor.detach().requires_grad_(tensor.requires_grad)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        velocity = ask()
    return velocity, sum(kept.values())


def to_keep(part: RolloutPlan, members: IntArray) -> tuple[BoolArray, ...]:  # T arrays (N_i,)
    """The nodes of a part at which edges begin that are booked on some rollouts of the whole plan."""
    chosen = tuple(np.zeros(len(nodes), dtype=np.bool_) for nodes in part.prompt[:-1])
    for level, (trained, first) in enumerate(zip(part.trained, part.first_leaf[1:], strict=True)):
        chosen[level][part.parent[level][trained & np.isin(first, members)]] = True
    return chosen
