"""Work that the processes of a run share out, shard by shard: what is computed there depends on the shard alone."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from aegpo.errors import AegpoError
from aegpo.parallel.team import Team

Purpose = Literal["signals", "rollouts", "update", "evaluation"]
_NUMBERS: dict[Purpose, int] = {"signals": 1, "rollouts": 2, "update": 3, "evaluation": 4}


@contextmanager
def piece(team: Team, purpose: Purpose, shard: int, number: int = 0) -> Iterator[None]:
    """Inside, a shard's part of some work is done; foreign parts draw from global generators that are its own.

    So what they draw depends neither on who does the shard nor on what else he does. Where a step has one shard,
    nothing changes.

    Args:
        team: whose shards they are.
        purpose: of the work.
        shard: which one.
        number: what tells this work from other work for the purpose in the same step.
    """
    if team.shards == 1:
        yield
        return
    key = (torch.initial_seed() % 2**64, _NUMBERS[purpose], number, shard)  # the first is of the training step
    python, legacy = random.getstate(), np.random.get_state(legacy=False)
    on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    with torch.random.fork_rng([torch.cuda.current_device()] if on_gpu else []):
        seed = int(np.random.SeedSequence(key).generate_state(1)[0])
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)


def shares(count: int, parts: int) -> list[slice]:
    """`count` neighbours in parts that differ by one at most."""
    ends = [count * part // parts for part in range(parts + 1)]
    return [slice(*pair) for pair in pairwise(ends)]


def shared_out(
    team: Team, purpose: Purpose, count: int, work: Callable[[slice], Sequence[Tensor]], least: int = 1
) -> tuple[Tensor, ...]:
    """What is found out about `count` things, some of them by each process; all processes have all of it.

    Args:
        team: the processes.
        purpose: of the work.
        count: at least 1.
        work: is asked about neighbours, at least one; gives tensors with a row for each of them, as many each time.
        least: so many at a time at least, if there are as many; some shards then have nothing to do.
    """
    cut, found = [slice(0, 0)] * team.shards, list[Sequence[Tensor]]()
    pieces = max(1, min(team.shards, count // least))
    for index, rows in enumerate(shares(count, pieces)):
        cut[index * team.shards // pieces] = rows
    for shard in team.mine:
        if cut[shard].stop > cut[shard].start:
            with piece(team, purpose, shard):
                found.append(work(cut[shard]))
    counts = [rows.stop - rows.start for rows in cut]
    own = [torch.cat(each) if len(each) > 1 else each[0] for each in zip(*found, strict=True)]
    return team.spread(purpose, own, counts)


def refuse_memories(team: Team, remembering: Iterable[str]) -> None:
    """Parts that only see what their own process works on must not remember: each copy would know something else.

    Args:
        team: the processes.
        remembering: the parts with a state, by their name in checkpoints.

    Raises:
        AegpoError: if there are several processes and such a part.
    """
    apart = [name for name in remembering if name.partition("-")[0] in ("reward", "objective", "sampler")]
    if team.size > 1 and apart:
        raise AegpoError(
            f"{apart[0].replace('-', ' ', 1)} keeps a state of what it saw, but each of {team.size} processes has a "
            "copy that sees only what its own process does; start the run with one process"
        )
