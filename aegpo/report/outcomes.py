"""What a comparison came to, in one of six words: what the verdict says and its table shows, so that they agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from aegpo.report.contrasts import Contrast
from aegpo.report.summary import Summary
from aegpo.report.wording import count, listing

ALPHA = 0.05
Outcome: TypeAlias = Literal["more", "less", "maybe more", "maybe less", "equal", "not shown"]


def outcome(each: Contrast) -> Outcome | None:
    """What a comparison came to; None where no test is possible.

    more, less: of the arm's gain, and p is below `ALPHA` once corrected; maybe: the interval over seeds excludes 0, but
    p is not once corrected; equal: within the margin, once corrected; else a difference is not shown, nor that
    there is none.
    """
    if each.p is None:
        return None
    more = each.mean > 0
    if holds(each):
        return "more" if more else "less"
    if each.over_seeds is not None and each.over_seeds.excludes_zero:
        return "maybe more" if more else "maybe less"
    return "equal" if each.p_equal_holm is not None and each.p_equal_holm < ALPHA else "not shown"


def holds(each: Contrast) -> bool:
    """True for a difference that is beyond doubt once corrected."""
    return each.p_holm is not None and each.p_holm < ALPHA


def differs(each: Contrast) -> bool:
    """True for a difference that is beyond doubt, or was before it was corrected."""
    return outcome(each) not in (None, "equal", "not shown")


@dataclass(frozen=True)
class Place:
    """Where arms are compared: after as many steps, or at the same cost."""

    name: str  # short
    words: str  # with numbers
    contrasts: tuple[Contrast, ...]  # of every label

    def compared(self, label: str) -> tuple[Contrast, ...]:
        """The contrasts of one label."""
        return tuple(each for each in self.contrasts if each.label == label)


def places_of(summary: Summary) -> tuple[Place, ...]:
    """Where arms are compared: at equal steps and, unless all cost the same, at equal cost."""
    steps = sorted({cost.steps for cost in summary.costs})
    alike = len(steps) == 1
    name = "at equal steps" if alike else "after the last step"
    words = f"{name} ({steps[0]})" if alike else f"{name} of each arm"
    equal = summary.equal_cost
    if equal is not None:
        cost = Place("at equal cost", f"at equal cost ({count(equal.cost)})", equal.contrasts)
        return Place(name, words, summary.contrasts), cost
    if alike and len(summary.costs) > 1 and min(cost.cost for cost in summary.costs) > 0:
        words = f"{words}, which cost the same"
    return (Place(name, words, summary.contrasts),)


def differing(summary: Summary) -> tuple[str, ...]:
    """The labels beside the headline under which arms differ somewhere, in the order of the tables."""
    found = {each.label for place in places_of(summary) for each in place.contrasts if differs(each)}
    return tuple(label for label in summary.labels if label in found and label != summary.headline)


def called(summary: Summary, label: str) -> str:
    """A label with its role, for a sentence: ``the guard diversity``."""
    rows = summary.under(label)
    trained = [row.arm for row in rows if row.trained]
    if not trained:
        return f"the guard {label}"
    if label != summary.headline:
        return f"{label}, which {listing(trained)} trained on" if len(trained) < len(rows) else f"its part {label}"
    parts = [each for each in summary.labels if each != label and all(row.trained for row in summary.under(each))]
    return f"the trained reward, the {label} of {listing(parts)}" if parts else f"the trained reward {label}"


def role(summary: Summary, label: str) -> str:
    """A label with its role, for the head of a column: ``diversity (guard)``."""
    rows: Sequence[bool] = [row.trained for row in summary.under(label)]
    return f"{label} ({'trained' if all(rows) else 'trained in some' if any(rows) else 'guard'})"
