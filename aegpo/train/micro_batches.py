"""Edges in batches that go through the network together: each state that any of them begins at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from aegpo.core.records import IntArray
from aegpo.train.places import on_device
from aegpo.train.retained import Retained


@dataclass(frozen=True)
class MicroBatch:
    """Some edges of a table, and the states at which the network is evaluated for them."""

    rows: Tensor  # (B,) int64, the edges
    heads: Tensor  # (b,) int64, an edge for each state: those that begin there share the evaluation
    of: Tensor | None = None  # (B,) int64, the state of each edge; None: each has its own
    retained: Retained | None = None  # what the network said there while sampling, if its graph was to be kept


def micro_batches(
    begin: IntArray, rows: IntArray, most: int, device: torch.device, group: IntArray | None = None
) -> list[MicroBatch]:
    """Edges in batches of at most `most` states, siblings together.

    Args:
        begin: (E,) the state that each edge of the table begins at; it never falls.
        rows: (B,) the edges, rising.
        most: states in a batch.
        device: where.
        group: (E,) of the edges; batches are of whole groups then, as many as fit, and a larger group is one alone.
    """
    if group is not None:
        rows = rows[np.argsort(group[rows], kind="stable")]
    first = np.flatnonzero(np.diff(begin[rows], prepend=-1))  # of each state's edges
    borders = np.arange(0, len(first), most) if group is None else _groups(group[rows[first]], most)
    cuts = np.append(first[borders], len(rows)).tolist()
    return _moved([_of(begin, rows[low:high]) for low, high in pairwise(cuts)], device)


def retained_batches(
    begin: IntArray, rows: IntArray, batches: Sequence[tuple[Retained, IntArray]], most: int, device: torch.device
) -> list[MicroBatch]:
    """The edges that begin in each batch of states which sampling has put together, and then the others.

    Batches in which none begins are left out.

    Args:
        begin: as for `micro_batches`.
        rows: as for `micro_batches`.
        batches: each with the numbers (b,) of its states.
        most: as for `micro_batches`, of the others.
        device: where.
    """
    found, retained = list[tuple[IntArray, IntArray, IntArray]](), list[Retained]()
    for batch, states in batches:
        chosen = rows[np.isin(begin[rows], states)]
        if len(chosen):
            found.append((chosen, np.searchsorted(begin, states), np.searchsorted(states, begin[chosen])))
            retained.append(batch)
    others = rows[~np.isin(begin[rows], np.concatenate([states for _, states in batches]))] if batches else rows
    return [*_moved(found, device, retained), *micro_batches(begin, others, most, device)]


def _groups(group: IntArray, most: int) -> IntArray:
    """Where batches of whole groups begin among (b,) states, which are in the order of their groups."""
    borders, first = [0], np.append(np.flatnonzero(np.diff(group, prepend=-1)), len(group)).tolist()
    for begin, end in pairwise(first):
        if end - borders[-1] > most and begin > borders[-1]:
            borders.append(begin)
    return np.array(borders, dtype=np.int64)


def _of(begin: IntArray, rows: IntArray) -> tuple[IntArray, IntArray, IntArray]:
    """Edges, one of each state's, and the state of each."""
    first = np.diff(begin[rows], prepend=-1) != 0
    return rows, rows[first], np.cumsum(first) - 1


def _moved(
    batches: Sequence[tuple[IntArray, IntArray, IntArray]],
    device: torch.device,
    retained: Sequence[Retained] | None = None,
) -> list[MicroBatch]:
    """Batches on the device, to which all of them go at once."""
    there = iter(on_device([each for batch in batches for each in batch], device))
    known: Sequence[Retained | None] = retained or [None] * len(batches)
    found = [MicroBatch(next(there), next(there), next(there), each) for each in known]
    return [
        MicroBatch(one.rows, one.heads, None if np.array_equal(rows, heads) else one.of, one.retained)
        for one, (rows, heads, _) in zip(found, batches, strict=True)
    ]
