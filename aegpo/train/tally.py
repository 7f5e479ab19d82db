"""What a training step measured: sums with their counts, and maxima, until the step is over."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from aegpo.parallel.team import Team


@dataclass(frozen=True)
class Mean:
    """A mean, as what was added up and over how much."""

    total: float
    count: float  # > 0; need not be whole

    def __add__(self, other: Mean) -> Mean:
        return Mean(self.total + other.total, self.count + other.count)

    @property
    def value(self) -> float:
        """The mean."""
        return self.total / self.count


class Tally(Mapping[str, float]):
    """Numbers of a training step by name, each a mean or a maximum; looking one up reduces it.

    Pieces of any size may be added in any number and tallies may be merged: a mean stays that of everything that went
    into it, which means of pieces cannot be once their counts differ.

    Example:
        >>> tally = Tally()
        >>> tally.add("loss", total=6.0, count=3)
        >>> tally.add("loss", total=2.0, count=1)
        >>> tally.raise_to("ratio_error", 0.5)
        >>> dict(tally)
        {'loss': 2.0, 'ratio_error': 0.5}
    """

    def __init__(self) -> None:
        self._found: dict[str, Mean | float] = {}

    def add(self, name: str, total: float, count: float = 1.0) -> None:
        """Adds a piece to a mean: the sum over `count` values."""
        piece, before = Mean(total, count), self._found.get(name)
        assert not isinstance(before, float), f"{name} is a maximum"
        self._found[name] = piece if before is None else before + piece

    def raise_to(self, name: str, value: float) -> None:
        """Lets a maximum know of a value."""
        before = self._found.get(name, value)
        assert not isinstance(before, Mean), f"{name} is a mean"
        self._found[name] = max(before, value)

    def counted(self, count: float) -> Tally:
        """The same with the counts of means in proportion, so that the largest is `count`.

        For sums of shares that only rounding keeps from a whole number: a mean of everything becomes exactly that.
        """
        largest = max((found.count for found in self._found.values() if isinstance(found, Mean)), default=1.0)
        tally = Tally()
        for name, found in self._found.items():
            if isinstance(found, Mean):
                tally.add(name, found.total, count * (found.count / largest))
            else:
                tally.raise_to(name, found)
        return tally

    def merge(self, other: Tally) -> None:
        """Adds all of another tally, name by name."""
        for name, found in other._found.items():
            if isinstance(found, Mean):
                self.add(name, found.total, found.count)
            else:
                self.raise_to(name, found)

    def take(self, name: str) -> float | None:
        """Takes a number out; None: there is none of the name."""
        if name not in self._found:
            return None
        value = self[name]
        del self._found[name]
        return value

    def __getitem__(self, name: str) -> float:
        found = self._found[name]
        return found.value if isinstance(found, Mean) else found

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def as_json(self) -> dict[str, list[float]]:
        """What `Tally.read` takes back: total and count of a mean, the value of a maximum."""
        return {
            name: [found.total, found.count] if isinstance(found, Mean) else [found]
            for name, found in self._found.items()
        }

    @classmethod
    def read(cls, told: Mapping[str, list[float]]) -> Tally:
        """What `as_json` said."""
        tally = cls()
        for name, values in told.items():
            tally._found[name] = Mean(*values) if len(values) > 1 else values[0]
        return tally


def together(team: Team, own: Mapping[int, Tally]) -> Tally:
    """What all shards measured, put together in their order; `own`: what each of this process's shards did."""
    if team.shards == 1:
        return own[0]
    whole = Tally()
    for told in team.told("measured", [own[shard].as_json() for shard in team.mine]):
        for each in told:
            whole.merge(Tally.read(each))
    return whole
