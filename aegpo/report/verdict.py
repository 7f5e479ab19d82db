"""What a report says in words for a reader who has not read the paper; the first sentence is the headline.

Each sentence is made of the outcomes that the tables show (`outcomes`), so that none can contradict a table.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from aegpo.report.contrasts import Contrast
from aegpo.report.in_numbers import in_numbers
from aegpo.report.outcomes import Outcome, Place, called, differing, differs, outcome, places_of
from aegpo.report.scores import Score
from aegpo.report.summary import Summary
from aegpo.report.wording import interval, label_decimals, listing, plural, signed

_TOLD: dict[Outcome, str] = {
    "more": "it gained more",
    "less": "it gained less",
    "maybe more": "it gained more, but that may be chance",
    "maybe less": "it gained less, but that may be chance",
    "equal": "both are equal within the margin",
    "not shown": "no difference shows",
}


def verdict(summary: Summary) -> tuple[str, ...]:
    """What the numbers say, sentence by sentence; the first is the headline."""
    return (*plainly(summary), *in_numbers(summary))


def plainly(summary: Summary) -> tuple[str, ...]:
    """The verdict in plain words: who gained more on what was trained and on every guard, at equal steps and cost."""
    rows = summary.under(summary.headline)
    if not rows:
        return ("No run is finished, so there is no verdict yet.",)
    return (*_comparison(summary, rows), *_controls(summary), *_progress(summary, rows), *_guards(summary))


def _comparison(summary: Summary, rows: Sequence[Score]) -> Iterator[str]:
    equal, places = summary.equal_cost, label_decimals(summary, summary.headline)
    if not summary.compared(summary.headline):
        best = max(rows, key=lambda row: row.gain)
        why = "there is no other arm" if len(summary.arms) == 1 else "there is nothing to compare it to"
        yield f"{best.arm} gained {signed(best.gain, places)} on {called(summary, summary.headline)}; {why}."
        return
    yield _headline(summary)
    yield from (f"On {_on(summary, label)}" for label in differing(summary))
    yield f"Highest gain on {summary.headline}: {_highest(rows, places)}" + (
        "." if equal is None else f"; at equal cost: {_highest(equal.under(summary.headline), places)}."
    )


def _highest(rows: Sequence[Score], places: int) -> str:
    best, first = max(rows, key=lambda row: row.gain), rows[0]
    against = "" if best is first else f", against {signed(first.gain, places)} of {first.arm}"
    return f"{best.arm}, {signed(best.gain, places)}{against}"


# --- headline --------------------------------------------------------------------------------------------------------


def _headline(summary: Summary) -> str:
    """Of what is trained; and it names every other label under which arms differ."""
    contrasts, others = summary.compared(summary.headline), differing(summary)
    if any(each.p is not None for each in contrasts):
        first = f"On {_on(summary, summary.headline)}"
    else:
        seeds = min(len(each.seeds) for each in contrasts)
        first = f"No verdict between arms: with {plural(seeds, 'seed')} no interval over seeds is possible."
    if not others:
        return first
    quiet = not any(differs(each) for place in places_of(summary) for each in place.compared(summary.headline))
    return f"{first} {'But arms' if quiet else 'Arms'} differ on {listing([called(summary, each) for each in others])}."


def _on(summary: Summary, label: str) -> str:
    """What one label says at each place, as the end of a sentence that begins with ``On``."""
    places = places_of(summary)
    family = sum(each.p is not None for place in places for each in place.compared(label))
    clauses = [_clause(place.compared(label), family) for place in places]
    name = called(summary, label)
    if len(set(clauses)) == 1:
        where = " and ".join(place.words for place in places)
        return f"{name}, {where}{' alike' if len(places) > 1 else ''}: {clauses[0]}."
    first, second = (f"{place.words}: {clause}" for place, clause in zip(places, clauses, strict=True))
    return f"{name}, {first}. {second[:1].upper()}{second[1:]}."


def _clause(contrasts: Sequence[Contrast], family: int) -> str:
    """Who gained more than whom: what holds for all comparisons together, and apart from it what does not."""
    found = {each: outcome(each) for each in contrasts}
    parts: list[str] = []
    for word in ("more", "less"):
        parts += _alike([each for each in contrasts if found[each] == word], f"gained {word} than")
    doubtful: list[str] = []
    for word in ("more", "less"):
        doubtful += _alike([each for each in contrasts if found[each] == f"maybe {word}"], f"gained {word} than")
    if doubtful:
        parts.append(f"{', '.join(doubtful)}, but that may be chance among {family} comparisons")
    parts += [f"{each}, within the margin" for each in _alike([e for e in contrasts if found[e] == "equal"], "equals")]
    seeds = min((len(each.seeds) for each in contrasts if each.p is not None), default=0)
    return "; ".join(parts) or f"no difference that these {seeds} seeds can resolve"


def _alike(contrasts: Sequence[Contrast], verb: str) -> Iterator[str]:
    """``a and b gained more than c``, with arms of the same references together."""
    arms: dict[str, list[str]] = {}
    for each in contrasts:
        arms.setdefault(each.reference, []).append(each.arm)
    references: dict[tuple[str, ...], list[str]] = {}
    for reference, names in arms.items():
        references.setdefault(tuple(names), []).append(reference)
    for alike, than in references.items():
        said = "equal" if verb == "equals" and len(alike) > 1 else verb
        yield f"{listing(alike)} {said} {listing(than)}"


# --- controls --------------------------------------------------------------------------------------------------------


def _controls(summary: Summary) -> Iterator[str]:
    """Each arm against its control, on what is trained, on every guard, and on parts of the reward that differ."""
    labels = [each for each in summary.labels if _is_told(summary, each)]
    for pair in summary.controls:
        told = [words for label in labels if (words := _against(summary, label, pair)) is not None]
        if told:
            yield f"{pair[0]} against its control, {pair[1]}: {'; '.join(told)}."


def _is_told(summary: Summary, label: str) -> bool:
    guard = not any(row.trained for row in summary.under(label))
    return guard or label == summary.headline or label in differing(summary)


def _against(summary: Summary, label: str, pair: tuple[str, str]) -> str | None:
    """What one label says of an arm and its control; None where no test is possible."""
    found: dict[Place, Outcome] = {}
    for place in places_of(summary):
        for each in place.compared(label):
            if (each.arm, each.reference) == pair and (came_to := outcome(each)) is not None:
                found[place] = came_to
    if not found:
        return None
    words = [f"{_TOLD[came_to]} {place.name}" for place, came_to in found.items()]
    if len(found) > 1 and len(set(found.values())) == 1:
        words = [f"{_TOLD[next(iter(found.values()))]}, {' and '.join(place.name for place in found)} alike"]
    return f"on {called(summary, label)}, {', '.join(words)}"


# --- what each label did ---------------------------------------------------------------------------------------------


def _progress(summary: Summary, rows: Sequence[Score]) -> Iterator[str]:
    places = label_decimals(summary, summary.headline)
    rose = [row.arm for row in rows if row.gain_interval and row.gain_interval.low > 0]
    rest = [f"{row.arm} {interval(row.gain_interval, places)}" for row in rows if row.arm not in rose]
    what = "what was trained" if any(not row.trained for row in rows) else f"the trained {summary.headline}"
    rise = f"Against the base, {what} rose on held-out prompts in"
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
            yield f"{guard} fell in {falls}: a sign of reward hacking{_one_seed(fell)}."
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


def _one_seed(rows: Sequence[Score]) -> str:
    return ", though of one seed alone" if all(len(row.seeds) < 2 for row in rows) else ""
