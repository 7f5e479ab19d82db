"""Sums over shards, by one fixed tree."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def by_halves(of: Callable[[int], list[Tensor | None]], first: int, count: int) -> list[Tensor | None]:
    """The sum over `count` shards from the `first`."""
    if count > 1 and count % 2 == 0:
        half = count // 2
        low = by_halves(of, first, half)
        return added(low, by_halves(of, first + half, half))
    total = of(first)
    for shard in range(first + 1, first + count):
        total = added(total, of(shard))
    return total


def added(low: list[Tensor | None], high: list[Tensor | None]) -> list[Tensor | None]:
    """Sums, in the place of one of the two. What is not there is 0 (-0 + 0 is 0), as it is between processes."""
    found: list[Tensor | None] = []
    for one, other in zip(low, high, strict=True):
        if one is None or other is None:
            there = other if one is None else one
            found.append(None if there is None else there.add_(0.0))
        else:
            found.append(one.add_(other))
    return found
