"""The report in words: numbers as text, and the verdict."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from aegpo.report.statistics import Interval
from aegpo.report.summary import Score, Summary

ALPHA = 0.05


def decimals(values: Sequence[float | None]) -> int:
    """Decimal places that show two digits of the smallest value, from 0 to 6; 3 if there is nothing to go by."""
    sizes = [abs(value) for value in values if value]
    return min(6, max(0, 1 - math.floor(math.log10(min(sizes))))) if sizes else 3


def label_decimals(summary: Summary, label: str) -> int:
    """Decimal places for the scores of one label: two digits of its narrowest interval."""
    rows = summary.under(label)
    widths = [row.gain_interval.half_width for row in rows if row.gain_interval]
    widths += [row.difference.over_seeds.half_width for row in rows if row.difference and row.difference.over_seeds]
    return min(decimals(widths), max(3, decimals([row.gain for row in rows])))


def signed(value: float, places: int) -> str:
    """A number with its sign."""
    text = f"{value:+.{places}f}"
    return text if float(text) else f"{0:.{places}f}"


def interval(value: Interval | None, places: int, absent: str = "not possible") -> str:
    """The ends of an interval."""
    return absent if value is None else f"[{signed(value.low, places)}, {signed(value.high, places)}]"


def count(value: float | None, absent: str = "not reached") -> str:
    """A large number with thousands apart, or one decimal below 100."""
    if value is None:
        return absent
    return f"{value:,.0f}" if abs(value) >= 100 or value == round(value) else f"{value:.1f}"


def listing(names: Sequence[str]) -> str:
    """``a, b and c``."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def plural(number: int, noun: str) -> str:
    """``1 seed``, ``3 seeds``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


# --- verdict ---------------------------------------------------------------------------------------------------------


def verdict(summary: Summary) -> tuple[str, ...]:
    """What the numbers say, sentence by sentence; the first is the headline."""
    rows = summary.under(summary.headline)
    if not rows:
        return ("No run is finished, so there is no verdict yet.",)
    return (*_comparison(summary, rows), *_progress(summary, rows), *_guards(summary))


def _comparison(summary: Summary, rows: Sequence[Score]) -> Iterator[str]:
    places, first = label_decimals(summary, summary.headline), summary.arms[0]
    best = max(rows, key=lambda row: row.gain)
    compared = [row for row in rows if row.difference is not None]
    if not compared:
        gain = f"{best.arm} gained {signed(best.gain, places)} on {summary.headline}"
        yield f"{gain}; {'there is no other arm' if len(summary.arms) == 1 else f'nothing can be compared to {first}'}."
        return
    resolved = [row for row in compared if _resolved(row)]
    number = min(len(row.difference.seeds) for row in compared if row.difference)
    if number < 2:
        yield f"No verdict between arms: with {plural(number, 'seed')} no interval over seeds is possible."
    elif not resolved:
        yield f"No difference to {first} that these {number} seeds can resolve."
    else:
        better = [row.arm for row in resolved if row.difference and row.difference.mean > 0]
        worse = [row.arm for row in resolved if row.difference and row.difference.mean < 0]
        parts = [f"{listing(better)} gained more than {first}"] if better else []
        parts += [f"{listing(worse)} gained less than {first}"] if worse else []
        holding = [row for row in resolved if row.difference and (row.difference.p_holm or 0) < ALPHA]
        doubt = "" if holding else f", but not once corrected for {len(compared)} comparisons"
        yield f"On {summary.headline}, {'; '.join(parts)}{doubt}."
    yield (
        f"The highest gain on {summary.headline} is that of {best.arm}, {signed(best.gain, places)}"
        + ("." if best.arm == first else f", against {signed(rows[0].gain, places)} of {rows[0].arm}.")
    )
    yield from _details(summary, resolved, len(compared), places)
    yield from _resolution(compared, places)


def _resolved(row: Score) -> bool:
    over_seeds = row.difference.over_seeds if row.difference else None
    return over_seeds is not None and over_seeds.excludes_zero


def _details(summary: Summary, resolved: Sequence[Score], compared: int, places: int) -> Iterator[str]:
    for row in resolved:
        difference = row.difference
        assert difference is not None
        assert difference.p_holm is not None
        text = (
            f"{row.arm} minus {summary.arms[0]}: {signed(difference.mean, places)}, 95 % CI over seeds "
            f"{interval(difference.over_seeds, places)} on these prompts"
        )
        both = difference.over_both is not None and difference.over_both.excludes_zero
        text += "; for new prompts too, " if both else "; but for new prompts as well, "
        text += f"{interval(difference.over_both, places)}"
        text += "." if both else ", which includes 0."
        if compared > 1:
            holds = "it holds" if difference.p_holm < ALPHA else "it does not hold"
            text += f" Corrected for {compared} comparisons {holds} (Holm, p = {difference.p_holm:.2g})."
        yield text


def _resolution(compared: Sequence[Score], places: int) -> Iterator[str]:
    differences = [row.difference for row in compared if row.difference]
    sizes = [each.smallest_detectable for each in differences if each.smallest_detectable]
    if sizes:
        low, high = f"{min(sizes):.{places}f}", f"{max(sizes):.{places}f}"
        size = low if low == high else f"{low} to {high}, depending on the arm,"
        number = min(len(each.seeds) for each in differences)
        yield f"With {plural(number, 'seed')} a true difference of {size} would have shown 4 times in 5."


def _progress(summary: Summary, rows: Sequence[Score]) -> Iterator[str]:
    rose = [row.arm for row in rows if row.gain_interval and row.gain_interval.low > 0]
    rest = [row.arm for row in rows if row.arm not in rose]
    rise = f"The trained {summary.headline} rose on held-out prompts in"
    if not rest:
        yield f"{rise} every arm, each 95 % CI above 0."
    elif rose:
        yield f"{rise} {listing(rose)}; not beyond doubt in {listing(rest)}."
    else:
        yield f"{rise} no arm beyond doubt: no 95 % CI is above 0."


def _guards(summary: Summary) -> Iterator[str]:
    for label in summary.labels:
        rows = summary.under(label)
        if any(row.trained for row in rows):
            continue
        places = label_decimals(summary, label)
        fell = [row for row in rows if row.gain_interval and row.gain_interval.high < 0]
        lower = [row.arm for row in rows if row.gain < 0 and row not in fell]
        if fell:
            falls = listing([f"{row.arm} ({signed(row.gain, places)})" for row in fell])
            yield f"The guard {label}, which no arm optimised, fell in {falls}: a sign of reward hacking."
        elif lower:
            yield f"The guard {label}, which no arm optimised, is lower in {listing(lower)}, within its 95 % CI."
        else:
            yield f"The guard {label}, which no arm optimised, fell in no arm."
