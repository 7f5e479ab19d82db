"""Numbers of the report as text."""

from __future__ import annotations

import math
from collections.abc import Sequence

from aegpo.report.reaching import Spent
from aegpo.report.statistics import Interval
from aegpo.report.summary import Summary

NOT_POSSIBLE = "not possible"


def decimals(values: Sequence[float | None]) -> int:
    """Decimal places that show two digits of the smallest value, from 0 to 6; 3 if there is nothing to go by."""
    sizes = [abs(value) for value in values if value]
    return min(6, max(0, 1 - math.floor(math.log10(min(sizes))))) if sizes else 3


def label_decimals(summary: Summary, label: str) -> int:
    """Decimal places for the scores of one label: two digits of its narrowest interval."""
    rows = summary.under(label)
    widths = [row.gain_interval.half_width for row in rows if row.gain_interval]
    widths += [each.over_seeds.half_width for each in summary.compared(label) if each.over_seeds]
    return min(decimals(widths), max(3, decimals([row.gain for row in rows])))


def signed(value: float, places: int) -> str:
    """A number with its sign."""
    text = f"{value:+.{places}f}"
    return text if float(text) else f"{0:.{places}f}"


def interval(value: Interval | None, places: int, absent: str = NOT_POSSIBLE) -> str:
    """The ends of an interval."""
    return absent if value is None else f"[{signed(value.low, places)}, {signed(value.high, places)}]"


def chance(value: float | None, absent: str = NOT_POSSIBLE) -> str:
    """A p-value."""
    return absent if value is None else f"{value:.2g}"


def spent(value: Spent) -> str:
    """What it took to reach a score, with its interval; if a seed did not, the low end alone."""
    if value.typical is None:
        absent = "not by all" if any(value.by_seed) else "not reached"
        return absent if value.low is None else f"{absent} [{count(value.low)}, ...]"
    if value.low is None or value.high is None:
        return count(value.typical)
    return f"{count(value.typical)} [{count(value.low)}, {count(value.high)}]"


def count(value: float) -> str:
    """A large number with thousands apart, or one decimal below 100."""
    return f"{value:,.0f}" if abs(value) >= 100 or value == round(value) else f"{value:.1f}"


def listing(names: Sequence[str]) -> str:
    """``a, b and c``."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def plural(number: int, noun: str) -> str:
    """``1 seed``, ``3 seeds``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
