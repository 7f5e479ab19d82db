"""What stands behind the verdict, in sentences: differences with intervals, and how small ones could have shown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from aegpo.report.contrasts import MARGIN_SHARE, Contrast
from aegpo.report.outcomes import ALPHA, called, differing, differs, outcome, places_of
from aegpo.report.summary import Summary
from aegpo.report.wording import chance, interval, label_decimals, listing, plural, signed


def in_numbers(summary: Summary) -> Iterator[str]:
    """Sentences that a reader of statistics asks for; none where nothing is compared."""
    contrasts, places = summary.compared(summary.headline), label_decimals(summary, summary.headline)
    for place in places_of(summary):
        yield from _shown(place.words, place.compared(summary.headline), places)
        yield from _nulls(summary, place.words, place.compared(summary.headline), places)
    for label in differing(summary):
        for place in places_of(summary):
            where = f"on {called(summary, label)}, {place.words}"
            yield from _shown(where, place.compared(label), label_decimals(summary, label))
    yield from _resolution(summary, contrasts, places)


def _shown(where: str, contrasts: Sequence[Contrast], places: int) -> Iterator[str]:
    """The differences whose interval over seeds excludes 0, with what is known of new prompts."""
    shown = [_in_full(each, places) for each in contrasts if differs(each)]
    if shown:
        how = "95 % CI over seeds on these prompts, p corrected (Holm)"
        yield f"{where[:1].upper()}{where[1:]}, {how}: {'; '.join(shown)}."


def _in_full(each: Contrast, places: int) -> str:
    text = f"{each.arm} minus {each.reference} {signed(each.mean, places)} {interval(each.over_seeds, places)}"
    both = interval(each.over_both, places)
    new = f"for new prompts too {both}"
    if each.over_both is None or not each.over_both.excludes_zero:
        new = f"but for new prompts as well {both}"
    return f"{text}, p = {chance(each.p_holm)}, {new}"


def _nulls(summary: Summary, where: str, contrasts: Sequence[Contrast], places: int) -> Iterator[str]:
    """The differences that do not show: how large they may be, and whether they are shown to be small."""
    unresolved = [each for each in contrasts if each.p is not None and not differs(each)]
    for reference in dict.fromkeys(each.reference for each in unresolved):
        found = [each for each in unresolved if each.reference == reference]
        names = [f"{each.arm} ({signed(each.mean, places)} {interval(each.over_seeds, places)})" for each in found]
        text = f"{where[:1].upper()}{where[1:]}, no difference to {reference} shows in {listing(names)}"
        yield f"{text}; {_equality(summary, found, places)}."


def _equality(summary: Summary, found: Sequence[Contrast], places: int) -> str:
    """Which arms are shown to be equal to their common reference."""
    reference, margin = found[0].reference, found[0].margin
    if margin is None:
        return f"{reference} gained nothing that a margin could be a share of, so equality is not tested"
    share = f"{100 * MARGIN_SHARE:.0f} % of {reference}'s gain" if summary.margin is None else "the margin of the file"
    within = f"within {margin:.{places}f}, {share}"
    equal = [each for each in found if outcome(each) == "equal"]
    rest = [each.arm for each in found if outcome(each) != "equal"]
    if not equal:
        who, p = ("it is not", "p") if len(found) == 1 else ("none of them is", "smallest p")
        smallest = min((each.p_equal_holm for each in found if each.p_equal_holm is not None), default=None)
        return f"{who} shown to be equal {within} (TOST, {p} = {chance(smallest)})"
    who = (
        "it is" if len(found) == 1 else f"{listing([each.arm for each in equal])} {'is' if len(equal) == 1 else 'are'}"
    )
    shown = ", ".join(chance(each.p_equal_holm) for each in equal)
    return f"{who} equal {within} (TOST, p = {shown})" + (f", {listing(rest)} not shown to be" if rest else "")


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
