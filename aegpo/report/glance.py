"""The verdict at a glance: every comparison and every label, each in a word and a number."""

from __future__ import annotations

from collections.abc import Iterator

from aegpo.report.outcomes import Place, outcome, places_of, role
from aegpo.report.summary import Summary
from aegpo.report.tables import NONE, Table
from aegpo.report.wording import label_decimals, signed

WORDS = (
    "More, less: the arm gained more or less than the one it is against, beyond doubt once corrected for the number of "
    "comparisons. Maybe: only before that correction. Equal: shown to differ by less than the margin. Not shown: "
    "neither a difference nor equality is shown; more seeds may show one. The number is the difference of the gains."
)


def glance_tables(summary: Summary) -> Iterator[Table]:
    """A table for equal steps and one for equal cost; nothing where no comparison can be tested."""
    for place in places_of(summary):
        rows = tuple(_rows(summary, place))
        if any(each.p is not None for each in place.contrasts):
            columns = ("arm", "against", *(role(summary, label) for label in summary.labels))
            yield Table(f"Who gained more {place.words}", columns, rows)


def _rows(summary: Summary, place: Place) -> Iterator[tuple[str, ...]]:
    controls = set(summary.controls)
    for pair in dict.fromkeys((each.arm, each.reference) for each in place.contrasts):
        against = f"{pair[1]}, its control" if pair in controls else pair[1]
        yield pair[0], against, *(_cell(summary, place, label, pair) for label in summary.labels)


def _cell(summary: Summary, place: Place, label: str, pair: tuple[str, str]) -> str:
    for each in place.compared(label):
        if (each.arm, each.reference) == pair and (word := outcome(each)) is not None:
            return f"{word} {signed(each.mean, label_decimals(summary, label))}"
    return NONE
