"""What an experiment file asks of its report: which arms are compared, and by what measure.

It belongs to the file, not to an arm: no run depends on it, so it may change when all runs are finished.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated

from pydantic import Field

from aegpo.core.problems import Problem
from aegpo.core.registry import Spec, suggestion


class VerdictSpec(Spec):
    """What the report compares, and by what measure."""

    comparisons: Annotated[tuple[tuple[str, str], ...], Field(min_length=1)] | None = Field(
        default=None,
        description="pairs [arm, reference]: the differences of gains that are tested and corrected for their number; "
        "null: of every arm to the first",
    )
    controls: Annotated[Mapping[str, str], Field(min_length=1)] | None = Field(
        default=None,
        description="{arm: control}: the arm that does the same without what is claimed, as at random; compared like "
        "'comparisons', and told apart from them in the verdict",
    )
    margin: Annotated[float, Field(gt=0)] | None = Field(
        default=None,
        description="difference of gains in what is optimised that counts as none; null: a fifth of the reference's "
        "gain",
    )
    target: float | None = Field(
        default=None,
        description="score of what is optimised that arms are timed to; null: 80 % of the gain of the best arm",
    )

    def pairs(self, arms: Sequence[str]) -> tuple[tuple[str, str], ...]:
        """The arms that are compared, each with its reference; those with their controls come last."""
        named = tuple((arm, arms[0]) for arm in arms[1:]) if self.comparisons is None else self.comparisons
        return (*named, *(pair for pair in (self.controls or {}).items() if pair not in named))

    def problems(self, arms: Sequence[str]) -> Iterator[Problem]:
        """What the comparisons get wrong in an experiment of these arms."""
        met = set[frozenset[str]]()
        for index, pair in enumerate(self.comparisons or ()):
            unknown = [place for place, arm in enumerate(pair) if arm not in arms]
            for place in unknown:
                message = f"no arm is called {pair[place]!r}; {suggestion(pair[place], arms)}"
                yield Problem(("comparisons", index, place), message)
            if not unknown and len(set(pair)) < 2:
                message = f"compares arm {pair[0]!r} with itself; give two arms, the second as the reference"
                yield Problem(("comparisons", index), message)
            elif not unknown and frozenset(pair) in met:
                message = f"compares {pair[0]!r} with {pair[1]!r} again; name each two arms once"
                yield Problem(("comparisons", index), message)
            met.add(frozenset(pair))
        yield from self._wrong_controls(arms)

    def _wrong_controls(self, arms: Sequence[str]) -> Iterator[Problem]:
        pairs = self.pairs(arms)
        for arm, control in (self.controls or {}).items():
            place = ("controls", arm)
            unknown = [name for name in (arm, control) if name not in arms]
            for name in unknown:
                yield Problem(place, f"no arm is called {name!r}; {suggestion(name, arms)}")
            if not unknown and arm == control:
                yield Problem(place, f"arm {arm!r} is no control of itself; name the arm that it is compared to")
            elif not unknown and (control, arm) in pairs:
                message = f"{control!r} is compared with {arm!r} already, the other way round; keep one of the two"
                yield Problem(place, message)
