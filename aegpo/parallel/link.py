"""What connects the processes of a run: rounds in which each says something, and messages of tensors.

Every message follows a round. In a round each process says where it is and what it has to say, or what went wrong with
it; so an error of one is known to all before anybody waits for what it will not send, and processes that have come to
different places are told so instead of waiting for each other. What a round says is JSON.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from torch.distributed.device_mesh import DeviceMesh

from aegpo.core.processes import Place
from aegpo.errors import ProcessLostError, SettingError
from aegpo.parallel.watch import Watch, asks_first, left, machine, watched

_T = TypeVar("_T")
JOINING = timedelta(minutes=10)  # for all processes to be there
_SHORT = 248  # bytes of what a round says that are sent at once; what is longer follows in a second message
_HEAD = 8  # bytes of its length


class Link:
    """The process groups of one run: gloo for rounds, and for tensors NCCL where each process has a GPU of its own."""

    def __init__(self, place: Place) -> None:
        """Waits until all processes are there.

        Raises:
            ProcessLostError: if they are not there in time.
        """
        self.place, self._rounds, self._timeout = place, 0, JOINING
        self.store = _store(place)
        try:
            dist.init_process_group("gloo", store=self.store, rank=place.rank, world_size=place.size, timeout=JOINING)
        except (RuntimeError, ValueError) as error:
            raise ProcessLostError(
                f"the {place.size} processes of this run did not find each other ({error}); is each of them started, "
                f"and can each reach {os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}?"
            ) from error
        self._control: dist.ProcessGroup = _world()
        self._data, self._carrier = self._control, torch.device("cpu")
        self.computes_on = self._carrier
        self._aside: dist.ProcessGroup | None = None
        self.help: Callable[[str, bool], None] = _nobody_asks
        self._watch: Watch | None = None
        self._watch = self._watched()

    def use(self, timeout: timedelta, device: torch.device) -> None:
        """From now on no process waits longer than `timeout` for another, and tensors go the way `device` allows."""
        self._timeout, self.computes_on = timeout, device
        own = device.type == "cuda" and self.place.local_size <= torch.cuda.device_count()
        where = "other connections are made"
        self._control = self._data = self._asked(where, lambda: dist.new_group(backend="gloo", timeout=timeout))
        if own:
            self._data = self._asked(where, lambda: dist.new_group(backend="nccl", timeout=timeout))
        self._carrier = device if own else torch.device("cpu")

    def aside(self) -> dist.ProcessGroup:
        """A group of its own, for what another thread sends while this one goes on: gloo, as the CPU sends it."""
        if self._aside is None:
            timeout = self._timeout
            self._aside = self._asked(
                "another connection is made", lambda: dist.new_group(backend="gloo", timeout=timeout)
            )
        return self._aside

    def mesh(self, replicas: int) -> DeviceMesh:
        """Of `Team.mesh`."""
        size, device = self.place.size, self.computes_on.type
        if size % replicas:
            raise SettingError(
                f"'replicas' is {replicas}, which does not divide the {size} processes of this run", "parallel"
            )
        if device == "cuda" and self._carrier.type != "cuda":
            raise SettingError("'weights' are sharded over processes with a GPU of their own each", "parallel")
        ranks = torch.arange(size).view(replicas, -1)
        groups = [self._group_of(each) for each in ((ranks.T, ranks) if replicas > 1 else (ranks,))]
        if replicas == 1:
            return DeviceMesh.from_group(groups[0], device)
        return DeviceMesh.from_group(groups, device, ranks, mesh_dim_names=("replicas", "shards"))

    def _group_of(self, ranks: Tensor) -> dist.ProcessGroup:
        """This process's of the groups (n, processes of each)."""
        backend, found = "nccl" if self._carrier.type == "cuda" else "gloo", None
        for each in ranks.tolist():
            group = self._asked(
                "other connections are made", partial(dist.new_group, each, timeout=self._timeout, backend=backend)
            )
            found = group if self.place.rank in each else found
        assert isinstance(found, dist.ProcessGroup), "every process is in one"
        return found

    def leave(self) -> None:
        """The last message was sent: each may end."""
        self._note(left(self.place.rank), "done")
        if self._watch is not None:
            self._watch.stop()
        dist.destroy_process_group()

    def tells_of_loss(self) -> bool:
        """True for the first process that asks: it tells the user that another one was lost."""
        return asks_first(self.store)

    def _watched(self) -> Watch:
        """A watch of the other processes on this machine."""
        answers = self.round("the start", {"value": [machine(), os.getpid()]})
        apart = self._asked("the start", lambda: _store(self.place, server=False))
        return watched(self.place, [tuple(each["value"]) for each in answers], apart)

    def _note(self, key: str, value: str) -> None:
        """Notes what others may want to know of this process; where the store is gone nobody can ask."""
        with suppress(RuntimeError):
            self.store.set(key, value)

    # --- rounds --------------------------------------------------------------------------------------------------

    def round(self, where: str, said: Mapping[str, Any]) -> list[dict[str, Any]]:
        """What every process says, by rank.

        Raises:
            ProcessLostError: if one does not answer, or is at another place.
        """
        self._rounds += 1
        self._note(self._key(self.place.rank), f"{self._rounds} {where}")
        message = json.dumps({**said, "at": where}).encode()
        answers = [json.loads(answer) for answer in self._asked(where, lambda: self._exchanged(message))]
        places = [answer.pop("at") for answer in answers]
        sound = [place for place, answer in zip(places, answers, strict=True) if not {"fault", "needs"} & set(answer)]
        if len(set(sound)) > 1:
            told = "; ".join(f"process {rank} at {place!r}" for rank, place in enumerate(places))
            raise ProcessLostError(
                f"the processes of this run went different ways ({told}); do all have the same packages, files and "
                "kind of processor?"
            )
        return answers

    def _exchanged(self, message: bytes) -> list[bytes]:
        def all_of(own: Tensor) -> list[Tensor]:
            found = [torch.empty_like(own) for _ in range(self.place.size)]
            dist.all_gather(found, own, group=self._control)
            return found

        head = len(message).to_bytes(_HEAD, "big") + message[:_SHORT]
        heads = [bytes(each.tolist()) for each in all_of(_bytes(head, _HEAD + _SHORT))]
        lengths = [int.from_bytes(each[:_HEAD], "big") for each in heads]
        if max(lengths) <= _SHORT:
            return [each[_HEAD : _HEAD + length] for each, length in zip(heads, lengths, strict=True)]
        whole = all_of(_bytes(message, max(lengths)))
        return [bytes(each[:length].tolist()) for each, length in zip(whole, lengths, strict=True)]

    # --- tensors -------------------------------------------------------------------------------------------------

    def gathered(self, own: Tensor, counts: Sequence[int]) -> Tensor:
        """The rows of every process, one after another; `counts` says how many each has."""
        most, place = max(counts), own.device
        if most == 0:
            return own
        padded = own.new_zeros((most, *own.shape[1:]), device=self._carrier)
        padded[: len(own)] = own
        found = [torch.empty_like(padded) for _ in counts]
        self._asked("a message", lambda: dist.all_gather(found, padded, group=self._data))
        return torch.cat([each[:count] for each, count in zip(found, counts, strict=True)]).to(place)

    def swapped(self, own: Tensor, partner: int) -> Tensor:
        """A partner's tensor of the same shape, which gets this process's."""
        return self.sent([(own, partner)], [(own, partner)])[0]

    def sent(self, gives: Sequence[tuple[Tensor, int]], takes: Sequence[tuple[Tensor, int]]) -> list[Tensor]:
        """Sends tensors to processes and returns those that come: shaped as `takes`, of whom and in which order.

        Both ends know shapes and order.
        """
        arriving = [torch.empty_like(tensor, device=self._carrier) for tensor, _ in takes]
        operations = [
            dist.P2POp(dist.isend, tensor.to(self._carrier).contiguous(), group=self._data, group_peer=to)
            for tensor, to in gives
        ]
        operations += [
            dist.P2POp(dist.irecv, tensor, group=self._data, group_peer=of)
            for tensor, (_, of) in zip(arriving, takes, strict=True)
        ]

        def all_done() -> None:
            for request in dist.batch_isend_irecv(operations):
                request.wait()

        if operations:
            self._asked("a message", all_done)
        return [tensor.to(like.device) for tensor, (like, _) in zip(arriving, takes, strict=True)]

    def summed(self, own: Tensor) -> Tensor:
        """The sum of everybody's tensors, equal to rounding; perhaps in the place of this process's."""
        total = own.to(self._carrier)
        self._asked("a message", lambda: dist.all_reduce(total, group=self._data))
        return total.to(own.device)

    # --- who does not answer -------------------------------------------------------------------------------------

    def _key(self, rank: int) -> str:
        return f"at/{rank}"

    def _asked(self, where: str, ask: Callable[[], _T]) -> _T:
        """What is asked of the others; who does not answer is named.

        Raises:
            ProcessLostError: if somebody is gone, or does not answer in time.
        """
        begin = time.monotonic()
        try:
            return ask()
        except RuntimeError as error:
            raise ProcessLostError(self._lost(where, time.monotonic() - begin)) from error

    def _lost(self, where: str, waited: float) -> str:
        others = [rank for rank in range(self.place.size) if rank != self.place.rank]
        behind = [rank for rank in others if self._is_behind(rank)]
        if not behind:  # who came as far may have stopped before it said anything
            behind = others if len(others) == 1 else self._watch.stopped() if self._watch is not None else []
        named = ", ".join(map(str, behind)) or "another one"
        which = f"process {named} of the {self.place.size} of this run"
        if waited >= self._timeout.total_seconds():
            return (
                f"{which} did not answer for {waited / 60:.1f} minutes, while this one waited ({where}); see what "
                "holds it up, or raise 'parallel.timeout_minutes' if it only needs longer"
            )
        return f"{which} ended or cannot be reached any more ({where}); the run goes on from its newest checkpoint"

    def _is_behind(self, rank: int) -> bool:
        try:
            if not self.store.check([self._key(rank)]):
                return True
            return int(self.store.get(self._key(rank)).split()[0]) < self._rounds
        except RuntimeError:  # the store went with the process that kept it
            return False


def _store(place: Place, server: bool = True) -> Store:
    """Where processes find each other: the agent's store, or one that the first process keeps, if it is to be made.

    An agent keeps its store when it starts its processes again, and torch 2.13 leaves the addresses of the first
    attempt in it, so that the second would call those: each attempt has names of its own here.
    """
    store = TCPStore(
        place.address,
        place.port,
        place.size,
        is_master=server and place.rank == 0 and not place.agent_keeps_store,
        timeout=JOINING,
        wait_for_workers=server,
        multi_tenant=True,
    )
    return PrefixStore(f"aegpo/{place.attempt}", store)


def _nobody_asks(what: str, own: bool) -> None:
    raise AssertionError(f"{what!r} is needed by a process, and nobody was told how")


def _world() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None, "it was just joined"
    return group


def _bytes(message: bytes, length: int) -> Tensor:
    return torch.frombuffer(bytearray(message.ljust(length, b"\0")), dtype=torch.uint8)
