"""What the numbers of a report say, in sentences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from aegpo.report.contrasts import MARGIN_SHARE, Contrast
from aegpo.report.scores import Score
from aegpo.report.summary import Summary
from aegpo.report.wording import chance, count, interval, label_decimals, listing, plural, signed

ALPHA = 0.05
LAST = "after the last step"


def verdict(summary: Summary) -> tuple[str, ...]:
    """What the numbers say, sentence by sentence; the first is the headline."""
    rows = summary.under(summary.headline)
    if not rows:
        return ("No run is finished, so there is no verdict yet.",)
    return (*_comparison(summary, rows), *_progress(summary, rows), *_guards(summary))


def _comparison(summary: Summary, rows: Sequence[Score]) -> Iterator[str]:
    contrasts, equal = summary.compared(summary.headline), summary.equal_cost
    places = label_decimals(summary, summary.headline)
    if not contrasts:
        best = max(rows, key=lambda row: row.gain)
        why = "there is no other arm" if len(summary.arms) == 1 else "there is nothing to compare it to"
        yield f"{best.arm} gained {signed(best.gain, places)} on {summary.headline}; {why}."
        return
    yield _headline(summary, contrasts)
    yield f"Highest gain on {summary.headline}: {_highest(rows, places)}" + (
        "." if equal is None else f"; at equal cost: {_highest(equal.scores, places)}."
    )
    sets = {LAST: contrasts} | ({} if equal is None else {"at equal cost": equal.contrasts})
    for where, found in sets.items():
        yield from _shown(where, found, places)
        yield from _nulls(summary, where, found, places)
    yield from _resolution(summary, contrasts, places)


# --- headline --------------------------------------------------------------------------------------------------------


def _headline(summary: Summary, contrasts: Sequence[Contrast]) -> str:
    if not any(_tested(contrasts)):
        seeds = min(len(each.seeds) for each in contrasts)
        return f"No verdict between arms: with {plural(seeds, 'seed')} no interval over seeds is possible."
    equal = summary.equal_cost
    family = len(_tested([*contrasts, *(equal.contrasts if equal is not None else ())]))
    last = _clause(contrasts, family)
    if equal is None:
        return f"On {summary.headline}, {last}."
    cost, there = f"at equal cost ({count(equal.cost)})", _clause(equal.contrasts, family)
    if last == there:
        return f"On {summary.headline}, {last}, {LAST} and {cost} alike."
    return f"On {summary.headline}, {LAST} {last}. {cost.capitalize()}, {there}."


def _tested(contrasts: Sequence[Contrast]) -> list[Contrast]:
    return [each for each in contrasts if each.p is not None]


def _clause(contrasts: Sequence[Contrast], family: int) -> str:
    """Who gained more than whom: what holds for all comparisons together, and apart from it what does not."""
    tested = _tested(contrasts)
    holding = [each for each in tested if _holds(each)]
    doubtful = [each for each in tested if _resolved(each) and not _holds(each)]
    parts = [*_more_and_less(holding)]
    if doubtful:
        parts.append(f"{', '.join(_more_and_less(doubtful))}, but not once corrected for {family} comparisons")
    seeds = min((len(each.seeds) for each in tested), default=0)
    return "; ".join(parts) or f"no difference that these {seeds} seeds can resolve"


def _more_and_less(contrasts: Sequence[Contrast]) -> Iterator[str]:
    for more, word in ((True, "more"), (False, "less")):
        arms: dict[str, list[str]] = {}
        for each in contrasts:
            if (each.mean > 0) == more:
                arms.setdefault(each.reference, []).append(each.arm)
        references: dict[tuple[str, ...], list[str]] = {}
        for reference, names in arms.items():
            references.setdefault(tuple(names), []).append(reference)
        for alike, than in references.items():
            yield f"{listing(alike)} gained {word} than {listing(than)}"


def _resolved(each: Contrast) -> bool:
    return each.over_seeds is not None and each.over_seeds.excludes_zero


def _holds(each: Contrast) -> bool:
    return each.p_holm is not None and each.p_holm < ALPHA


def _highest(rows: Sequence[Score], places: int) -> str:
    best, first = max(rows, key=lambda row: row.gain), rows[0]
    against = "" if best is first else f", against {signed(first.gain, places)} of {first.arm}"
    return f"{best.arm}, {signed(best.gain, places)}{against}"


# --- differences -----------------------------------------------------------------------------------------------------


def _shown(where: str, contrasts: Sequence[Contrast], places: int) -> Iterator[str]:
    """The differences whose interval over seeds excludes 0, with what is known of new prompts."""
    shown = [_in_full(each, places) for each in contrasts if _resolved(each)]
    if shown:
        yield f"{where.capitalize()}, 95 % CI over seeds on these prompts, p corrected (Holm): {'; '.join(shown)}."


def _in_full(each: Contrast, places: int) -> str:
    text = f"{each.arm} minus {each.reference} {signed(each.mean, places)} {interval(each.over_seeds, places)}"
    both = interval(each.over_both, places)
    new = f"for new prompts too {both}"
    if each.over_both is None or not each.over_both.excludes_zero:
        new = f"but for new prompts as well {both}"
    return f"{text}, p = {chance(each.p_holm)}, {new}"


def _nulls(summary: Summary, where: str, contrasts: Sequence[Contrast], places: int) -> Iterator[str]:
    """The differences that do not show: how large they may be, and whether they are shown to be small."""
    unresolved = [each for each in _tested(contrasts) if not _resolved(each)]
    for reference in dict.fromkeys(each.reference for each in unresolved):
        found = [each for each in unresolved if each.reference == reference]
        names = [f"{each.arm} ({signed(each.mean, places)} {interval(each.over_seeds, places)})" for each in found]
        text = f"{where.capitalize()}, no difference to {reference} shows in {listing(names)}"
        yield f"{text}; {_equality(summary, found, places)}."


def _equality(summary: Summary, found: Sequence[Contrast], places: int) -> str:
    """Which arms are shown to be equal to their common reference."""
    reference, margin = found[0].reference, found[0].margin
    if margin is None:
        return f"{reference} gained nothing that a margin could be a share of, so equality is not tested"
    share = f"{100 * MARGIN_SHARE:.0f} % of {reference}'s gain" if summary.margin is None else "the margin of the file"
    within = f"within {margin:.{places}f}, {share}"
    equal = [each for each in found if _equal(each)]
    rest = [each.arm for each in found if not _equal(each)]
    if not equal:
        who, p = ("it is not", "p") if len(found) == 1 else ("none of them is", "smallest p")
        smallest = min((each.p_equal_holm for each in found if each.p_equal_holm is not None), default=None)
        return f"{who} shown to be equal {within} (TOST, {p} = {chance(smallest)})"
    who = (
        "it is" if len(found) == 1 else f"{listing([each.arm for each in equal])} {'is' if len(equal) == 1 else 'are'}"
    )
    shown = ", ".join(chance(each.p_equal_holm) for each in equal)
    return f"{who} equal {within} (TOST, p = {shown})" + (f", {listing(rest)} not shown to be" if rest else "")


def _equal(each: Contrast) -> bool:
    return each.p_equal_holm is not None and each.p_equal_holm < ALPHA


def _resolution(summary: Summary, contrasts: Sequence[Contrast], places: int) -> Iterator[str]:
    sizes = {each.smallest_detectable: each for each in contrasts if each.smallest_detectable}
    if not sizes:
        return
    low, high = sizes[min(sizes)], sizes[max(sizes)]
    size = " to ".join(dict.fromkeys(f"{each.smallest_detectable:.{places}f}" for each in (low, high)))
    ends = [each.detectable_range for each in sizes.values() if each.detectable_range is not None]
    known = f"{min(each.low for each in ends):.{places}f} to {max(each.high for each in ends):.{places}f}"
    number = min(len(each.seeds) for each in contrasts)
    yield (
        f"With {plural(number, 'seed')} a true difference of {size} would have shown 4 times in 5 (95 % CI {known}: "
        f"the spread of seeds is itself an estimate, pooled over arms with {low.df} degrees of freedom and taken to be "
        "alike in all)."
    )
    if summary.uneven is not None and summary.uneven.p < ALPHA:
        yield (
            f"{summary.uneven.arm} varies more between seeds than the other arms (p = {chance(summary.uneven.p)}), "
            "which the pooled spread does not allow for: its differences are less sure than their intervals say."
        )


# --- what each label did ---------------------------------------------------------------------------------------------


def _progress(summary: Summary, rows: Sequence[Score]) -> Iterator[str]:
    places = label_decimals(summary, summary.headline)
    rose = [row.arm for row in rows if row.gain_interval and row.gain_interval.low > 0]
    rest = [f"{row.arm} {interval(row.gain_interval, places)}" for row in rows if row.arm not in rose]
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
        guard = f"The guard {label}, which no arm optimised,"
        if fell:
            falls = listing([f"{row.arm} ({signed(row.gain, places)})" for row in fell])
            yield f"{guard} fell in {falls}: a sign of reward hacking."
        elif lower:
            yield f"{guard} is lower in {listing(lower)}, within its 95 % CI{_at_most(rows, places)}."
        else:
            yield f"{guard} fell in no arm{_at_most(rows, places)}."


def _at_most(rows: Sequence[Score], places: int) -> str:
    """How far a guard may have fallen in some arm."""
    ends = [row.gain_interval.low for row in rows if row.gain_interval]
    if not ends:
        return ""
    return f", by {max(0.0, -min(ends)):.{places}f} at most in any" if min(ends) < 0 else " and rose in each"
