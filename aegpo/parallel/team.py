"""The processes of one run: which part of a step each computes, what is gathered, and errors that all agree on.

A training step is cut into `shards`, neighbouring parts of the work; each process has neighbouring shards. Nothing is
ever computed across shards, and what shards found is put together in their order and added up by one fixed tree. So
with as many shards the result is the same, to the bit, on any number of processes that is a power of two and divides
them (and, of one process, on one kind of processor with one number of threads).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from aegpo.core.processes import Place, place
from aegpo.core.records import IntArray
from aegpo.errors import AegpoError
from aegpo.parallel.faults import Fault, agreed_on, fault_of
from aegpo.parallel.sums import by_halves

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist
    from torch import Tensor
    from torch.distributed.device_mesh import DeviceMesh

    from aegpo.parallel.link import Link

T = TypeVar("T")
MOST_SUMMED_BY_TREE = 100_000_000  # trained weights; a ring moves less of more


class Team:
    """The processes of a run, as one of them sees them. One process is a team too; then nothing is sent."""

    def __init__(self, where: Place, link: Link | None, shards: int) -> None:
        """`link`: None for a process alone; `shards`: at least as many as processes."""
        self.place, self.shards, self._link = where, shards, link

    @classmethod
    def alone(cls, shards: int = 1) -> Team:
        """One process."""
        return cls(Place(), None, shards)

    @classmethod
    def joined(cls) -> Team:
        """The processes that a launcher started for this command, once all are there; alone if it started one.

        Raises:
            AegpoError: if they cannot find each other.
        """
        where = place()
        if where.alone:
            return cls(where, None, where.size)
        from aegpo.parallel.link import Link

        return cls(where, Link(where), where.size)

    def cut(self, shards: int) -> Team:
        """The same processes, for steps of so many shards."""
        return Team(self.place, self._link, shards)

    def use(self, minutes: float, device: torch.device) -> None:
        """How long a process waits for another from now on, and where it computes."""
        if self._link is not None:
            self._link.use(timedelta(minutes=minutes), device)

    def aside(self) -> dist.ProcessGroup:
        """A group for what another thread of each process sends while this one goes on; made when all first ask."""
        assert self._link is not None, "a process alone sends nothing"
        return self._link.aside()

    def leave(self) -> None:
        """The end, to which all come: nothing is said any more.

        Raises:
            AegpoError: the error of another process, if one has failed meanwhile.
        """
        if self._link is not None:
            self.told("the end")
            self._link.leave()

    def tells_of_loss(self) -> bool:
        """True for the one that is to tell the user that another one was lost."""
        return self._link is None or self._link.tells_of_loss()

    # --- who is who --------------------------------------------------------------------------------------------------

    @property
    def size(self) -> int:
        """How many processes."""
        return self.place.size

    @property
    def first(self) -> bool:
        """True for the one that writes files and speaks to the user."""
        return self.place.rank == 0

    @property
    def mine(self) -> range:
        """This process's shards."""
        return self.of(self.place.rank)

    def of(self, rank: int) -> range:
        """The shards of a process; a process more than there are shards has none."""
        return range(rank * self.shards // self.size, (rank + 1) * self.shards // self.size)

    @property
    def exact(self) -> bool:
        """True if any other number of processes that is a power of two and divides the shards has the same sums."""
        return self.size & (self.size - 1) == 0 and self.shards % self.size == 0

    def by_process(self, counts: Sequence[int]) -> list[int]:
        """From a count for each shard that of each process."""
        return [sum(counts[shard] for shard in self.of(rank)) for rank in range(self.size)]

    # --- what they say -----------------------------------------------------------------------------------------------

    def told(self, where: str, value: Any = None) -> list[Any]:
        """Everybody's value, which is JSON, by process; `where`: the place in the run, the same for all.

        Raises:
            AegpoError: the error of another process, if one has failed meanwhile.
        """
        return [value] if self._link is None else self._round(self._link, where, {"value": value})

    def of_first(self, where: str, make: Callable[[], T]) -> T:
        """What the first process makes, which is JSON; the others wait for it, and get it or the error."""
        with self.agreed(where):
            made = make() if self.first else None
        found: T = self.told(f"{where}, told", made)[0]
        return found

    def any(self, where: str, flag: bool) -> bool:
        """True if it is for one of them."""
        return any(self.told(where, flag))

    def same(self, where: str, digest: Callable[[], str]) -> None:
        """What all processes computed must be equal; a process alone does not look.

        Raises:
            AegpoError: if it is not.
        """
        if self._link is None:
            return
        digests = self.told(where, digest())
        others = [rank for rank, each in enumerate(digests) if each != digests[0]]
        if others:
            raise AegpoError(
                f"process {others[0]} has another {where} than process 0; all processes of a run need one kind of "
                "processor, the same packages and the same files"
            )

    @contextmanager
    def agreed(self, where: str) -> Iterator[None]:
        """Inside, whatever one process raises all of them raise, where they are; all leave it together.

        Only the first process tells it, or of an error that is nobody's fault but ours the one that has it.
        """
        if self._link is None:
            yield
            return
        try:
            yield
        except Exception as error:
            if not agreed_on(error):
                fault = fault_of(error, self.place)
                self._round(self._link, where, {"fault": fault.as_json()}, error)
            raise
        self._round(self._link, where, {})

    def _round(self, link: Link, where: str, said: dict[str, Any], own: Exception | None = None) -> list[Any]:
        while True:
            answers = link.round(where, said)
            faults = [Fault(**answer["fault"]) for answer in answers if "fault" in answer]
            if faults:
                raise faults[0].error(self.place, own) from (own.__cause__ if own is not None else None)
            needed = {answer["needs"] for answer in answers if "needs" in answer}
            if not needed:
                return [answer.get("value") for answer in answers]
            first = min(needed)  # the same one everywhere; who needs another one asks again
            link.help(first, said.get("needs") == first)
            if said.get("needs") == first:
                return []

    # --- sharded weights ---------------------------------------------------------------------------------------------

    def help_with(self, helper: Callable[[str, bool], None]) -> None:
        """From now on `helper(what, own)` is called in every process when one, perhaps this one, says `need`."""
        if self._link is not None:
            self._link.help = helper

    def need(self, what: str) -> None:
        """Returns when all processes have come to a round and taken part in what this one needs; see `help_with`."""
        if self._link is not None:
            self._round(self._link, f"{what} is needed", {"needs": what})

    def mesh(self, replicas: int) -> DeviceMesh:
        """(processes,), or with replicas (replicas, processes of each), neighbours together; all processes ask.

        Raises:
            SettingError: if they cannot have sharded weights, or not in so many replicas.
        """
        assert self._link is not None, "a process alone has all weights"
        return self._link.mesh(replicas)

    @contextmanager
    def in_turn(self, where: str) -> Iterator[None]:
        """Inside, the first of each machine goes before its others: for files that it makes and the others find."""
        leads = self.place.local_rank == 0
        with self.agreed(f"{where}, the first of each machine"):
            if leads:
                yield
        if not leads:
            yield
        self.told(where)

    # --- tensors -----------------------------------------------------------------------------------------------------

    def gathered(self, where: str, own: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
        """The rows (n, ...) of all shards, in their order.

        Args:
            where: the place in the run.
            own: those of each of this process's shards; where a shard has none, still of the right shape and type.
            counts: how many rows each shard has, of all processes; all of them know.
        """
        import torch

        mine = torch.cat(list(own)) if len(own) != 1 else own[0]
        if self._link is None:
            return mine
        self.told(where)
        return self._link.gathered(mine, self.by_process(counts))

    def spread(self, where: str, own: Sequence[Tensor], counts: Sequence[int]) -> tuple[Tensor, ...]:
        """The rows of all shards, in their order, of several tensors that nobody knows the shapes of before.

        Args:
            where: the place in the run.
            own: of each tensor the rows of this process's shards; nothing at all where these have none.
            counts: how many rows each shard has, of all processes; all of them know.
        """
        if self._link is None:
            return tuple(own)
        import torch

        shapes = self.told(where, [[str(each.dtype).removeprefix("torch."), *each.shape[1:]] for each in own])
        known = next(shape for shape in shapes if shape)
        rows, device = self.by_process(counts), self._link.computes_on
        if not own:
            own = [torch.empty((0, *shape), dtype=getattr(torch, dtype), device=device) for dtype, *shape in known]
        return tuple(self._link.gathered(each, rows) for each in own)

    def moved(
        self, where: str, own: Sequence[Tensor], holder: IntArray, place: IntArray, wanted: Sequence[IntArray]
    ) -> list[Tensor]:
        """Rows of tables, each of which one process holds, to those who want them; nothing else is sent.

        Args:
            where: the place in the run.
            own: of each table the rows (n, ...) that this process holds.
            holder: (E,) the process that holds each row.
            place: (E,) at which place it holds it.
            wanted: for each process, the rows that it asks for.

        Returns:
            Of each table, the rows (m, ...) that this process asked for, in the order in which it did.
        """
        import torch

        rank, mine = self.place.rank, wanted[self.place.rank]
        found = [table.new_empty((len(mine), *table.shape[1:])) for table in own]
        gives: list[tuple[Tensor, int]] = []
        takes: list[tuple[Tensor, int]] = []
        arriving: list[tuple[Tensor, Tensor]] = []
        for other in range(self.size):
            given = place[wanted[other][holder[wanted[other]] == rank]]
            taken = np.flatnonzero(holder[mine] == other)
            for table, target in zip(own, found, strict=True):
                rows, places = (torch.from_numpy(each).to(table.device) for each in (given, taken))
                if other == rank:
                    target[places] = table[rows]
                    continue
                if len(given):
                    gives.append((table[rows], other))
                if len(taken):
                    takes.append((table.new_empty((len(taken), *table.shape[1:])), other))
                    arriving.append((target, places))
        if self._link is not None:
            self.told(where)
            for (target, places), rows in zip(arriving, self._link.sent(gives, takes), strict=True):
                target[places] = rows
        return found

    def summed(
        self, where: str, like: Sequence[Tensor], of: Callable[[int], list[Tensor | None]]
    ) -> list[Tensor | None]:
        """The sum over all shards of the tensors that each shard has; None where no shard has one.

        Shards are halved as long as their number is even, and the sums of halves added: whatever number of processes
        halves them too finds the same bits. At most 1 + log2(shards) sums of a process are in memory at a time. Of
        more than `MOST_SUMMED_BY_TREE` numbers, and on other numbers of processes, sums are equal to rounding.

        Args:
            where: the place in the run.
            like: tensors of the shapes and types of the sums.
            of: computes the tensors of one of this process's shards; nothing is sent meanwhile.
        """
        nothing: list[Tensor | None] = [None] * len(like)
        own = by_halves(of, self.mine.start, len(self.mine)) if self.mine else nothing
        return own if self._link is None else self._across(self._link, where, like, own)

    def by_tree(self, numbers: int) -> bool:
        """True if sums of so many numbers are the same to the bit on other numbers of processes."""
        return self.exact and numbers <= MOST_SUMMED_BY_TREE

    def _across(
        self, link: Link, where: str, like: Sequence[Tensor], own: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """The sums of all processes."""
        import torch

        lacks = [set(each) for each in self.told(where, [index for index, each in enumerate(own) if each is None])]
        there = [index for index in range(len(like)) if not all(index in each for each in lacks)]
        by_tree = self.by_tree(sum(each.numel() for each in like))
        found: list[Tensor | None] = [None] * len(like)
        for dtype in dict.fromkeys(like[index].dtype for index in there):
            chosen = [index for index in there if like[index].dtype == dtype]
            parts = [torch.zeros_like(like[index]) if own[index] is None else own[index] for index in chosen]
            total = self._total(link, torch.cat([part.flatten() for part in parts if part is not None]), by_tree)
            for index, part in zip(chosen, torch.split(total, [like[index].numel() for index in chosen]), strict=True):
                found[index] = part.view_as(like[index])
        return found

    def _total(self, link: Link, own: Tensor, by_tree: bool) -> Tensor:
        """The sum of everybody's tensors, in the place of this process's."""
        if not by_tree:
            return link.summed(own)
        step = 1
        while step < self.size:
            own += link.swapped(own, self.place.rank ^ step)  # the same bits on both sides
            step *= 2
        return own
