"""What each process of a run takes of its GPU while images are sampled and while it learns; and who holds the weights.

Pure arithmetic over a `Footprint`; imports no torch. A run and `aegpo check` decide by the same functions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from aegpo.core.footprint import Footprint, Shares
from aegpo.core.moments import FLOAT32
from aegpo.core.problems import Problem
from aegpo.core.sections import OptimizerSpec, ParallelSpec

Weights = Literal["whole", "sharded"]

USABLE = 0.8  # of free memory: the rest is for rewards, decoding and slack (our choice)
_AT_ONCE = 2  # blocks that are gathered: the one in use and the next one


@dataclass(frozen=True)
class Phases:
    """Bytes of one GPU, by what the run is doing; decoding, rewards and the allocator's slack come on top."""

    training: int
    sampling: int

    @property
    def largest(self) -> int:
        """Of the phase that takes most."""
        return max(self.training, self.sampling)


def parts_of(processes: int, replicas: int) -> int:
    """Processes that hold all sharded weights together: each of them has so small a part."""
    return max(1, processes // replicas)


def share(footprint: Footprint, shards: int) -> Footprint | None:
    """What each of `shards` processes needs to learn where they share weights and states; None: it cannot be shared.

    Its weights count the blocks that are gathered while it learns, and gradients of one. Graphs of sampling are never
    kept, since they would hold the weights that were gathered for them.
    """
    shares, before = footprint.shares, footprint.weights + footprint.optimizer
    if shares is None:
        return None
    gradients = math.ceil(shares.block * footprint.trainable / footprint.parameters)
    weights = _held(footprint, shares, shards) + shares.outside + _AT_ONCE * shares.block + gradients
    found = replace(footprint, weights=weights, optimizer=math.ceil(footprint.optimizer / shards), retained=0)
    if footprint.whole_from is None:
        return found
    beside = footprint.whole_from * USABLE - before  # activations, and graphs of sampling, None: as many again
    activations = beside / 2 if footprint.retained is None else beside - footprint.retained
    return replace(found, whole_from=math.ceil((weights + found.optimizer + activations) / USABLE))


def room_as_if_whole(footprint: Footprint | None, shards: int, room: int) -> int:
    """The free bytes with which a process that holds all weights decides as one of `shards` does with `room`.

    For `ModelSpec.settled`, which knows of no sharing: whether activations are computed again.
    """
    part = None if footprint is None else share(footprint, shards)
    if footprint is None or part is None or footprint.whole_from is None or part.whole_from is None:
        return room
    return room + footprint.whole_from - part.whole_from


def phases(
    footprint: Footprint,
    processes: int,
    weights: Weights,
    *,
    replicas: int = 1,
    gather: Literal["sampling", "never"] = "sampling",
    room: int | None = None,
    sums: int | None = None,
) -> Phases | None:
    """What each of a run's processes takes of its GPU.

    Args:
        footprint: of one process that holds all weights.
        processes: of the run, a GPU each.
        weights: who holds them.
        replicas: of sharded weights, how many times all of them are there; divides `processes`.
        gather: of sharded weights, when a process has all of them.
        room: free bytes of a GPU, by which activations are computed again or not; None: they are, where they may be.
        sums: of whole weights, bytes that adding up gradients takes; None: one flat gradient, the least.

    Returns:
        None where the footprint does not say it.
    """
    shares = footprint.shares
    if shares is None:
        return None
    if weights == "sharded":
        shards = parts_of(processes, replicas)
        learning, added = share(footprint, shards) or footprint, 0
        states = _held(footprint, shares, shards) + math.ceil((footprint.optimizer - shares.gradients) / shards)
        every, few = max(shares.network, shares.base), shares.outside + _AT_ONCE * shares.block
        states += every if gather == "sampling" else few
    else:
        learning, added = footprint, _flat_gradient(footprint, processes) if sums is None else sums
        states = footprint.weights + footprint.optimizer - shares.gradients + (footprint.retained or 0)
    learning = learning if room is None else learning.on(room)
    return Phases(learning.total + added, states + shares.sampling)


def whole_needs(footprint: Footprint, processes: int) -> int:
    """Bytes that each of several processes takes while it learns with all weights, and adds up gradients."""
    return footprint.total + _flat_gradient(footprint, processes)


def whole_weights_from(footprint: Footprint, processes: int) -> int:
    """Free bytes of a GPU from which on `weights: auto` leaves all weights on every process (our choice)."""
    return math.ceil(whole_needs(footprint, processes) / USABLE)


def chosen_weights(parallel: ParallelSpec, footprint: Footprint | None, processes: int, room: int) -> Weights:
    """Who holds the weights of a run.

    One process always has all of them. `auto`: several have a part each where all would not fit into four fifths of
    `room`, unless the model does not say what it needs or what of it could be shared.

    Args:
        parallel: what the experiment says.
        footprint: of one process that holds all weights; None: not known.
        processes: of the run.
        room: free bytes of the GPU that has fewest.
    """
    if processes == 1:
        return "whole"
    if parallel.weights != "auto":
        return parallel.weights
    if footprint is None or footprint.shares is None:
        return "whole"
    return "sharded" if room < whole_weights_from(footprint, processes) else "whole"


def sharding_problems(parallel: ParallelSpec, optimizer: OptimizerSpec, precision: str) -> Iterator[Problem]:
    """What goes with no sharded weights."""
    if parallel.weights != "sharded":
        return
    if precision == "float16":
        message = (
            "'float16' goes with no 'parallel.weights: sharded', whose processes would scale gradients apart; "
            "write 'precision: bfloat16', or 'parallel.weights: whole'"
        )
        yield Problem(("precision",), message)
    if optimizer.moments == "8bit":
        message = (
            "'8bit' goes with no 'parallel.weights: sharded', since its blocks of 256 weights would be cut; write "
            "'moments: float32', of which each process has its part, or 'parallel.weights: whole'"
        )
        yield Problem(("optimizer", "moments"), message)
    if optimizer.retain not in ("auto", "never"):
        message = (
            f"{optimizer.retain:g} GiB of graphs go with no 'parallel.weights: sharded', since each graph would hold "
            "gathered weights; write 'retain: never', which 'auto' is there, or 'parallel.weights: whole'"
        )
        yield Problem(("optimizer", "retain"), message)


def replicas_refused(parallel: ParallelSpec, processes: int) -> str | None:
    """Why so many processes cannot hold sharded weights `replicas` times; None: they can, or need not."""
    if parallel.weights == "whole" or processes == 1 or processes % parallel.replicas == 0:
        return None
    divisors = [number for number in range(1, processes + 1) if processes % number == 0]
    return (
        f"{parallel.replicas} does not divide the {processes} processes of the run, so they cannot hold the weights "
        f"{parallel.replicas} times; choose one of {', '.join(map(str, divisors))}, or another number of processes"
    )


def _held(footprint: Footprint, shares: Shares, shards: int) -> int:
    """Weights of one process, with its part of those that are shared."""
    return shares.unshared + math.ceil((footprint.weights - shares.unshared) / shards)


def _flat_gradient(footprint: Footprint, processes: int) -> int:
    return footprint.trainable * FLOAT32 if processes > 1 else 0
