"""The price of settings of the entropy probe against how well they keep the exact probe's choices, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

SIZE, DPI = (7.5, 4.6), 110


@dataclass(frozen=True)
class Point:
    """One setting."""

    name: str
    share: float  # of a training step, base entropies known
    agreement: float  # in [0, 1]


def on_frontier(points: Sequence[Point]) -> list[Point]:
    """The settings than which no other is both cheaper and better, the cheapest first."""
    found: list[Point] = []
    for point in sorted(points, key=lambda each: (each.share, -each.agreement)):
        if not found or point.agreement > found[-1].agreement:
            found.append(point)
    return found


def draw(points: Sequence[Point], aim: tuple[float, float], path: Path) -> None:
    """Writes a PNG; `aim`: the most a setting should cost, and the least it should keep."""
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    best = on_frontier(points)
    rest = [point for point in points if point not in best]
    axes.scatter([100 * each.share for each in rest], [each.agreement for each in rest], s=14, color="0.6")
    axes.plot([100 * each.share for each in best], [each.agreement for each in best], "o-", color="C0", ms=5, lw=1.2)
    for each in (*best, *rest):
        tone = "black" if each in best else "0.45"
        offset, place = ((6, -9), "left") if each in best else ((-5, 3), "right")
        where = (100 * each.share, each.agreement)
        axes.annotate(each.name, where, xytext=offset, textcoords="offset points", ha=place, fontsize=6, color=tone)
    most, least = aim
    axes.axvspan(0, 100 * most, ymin=0, ymax=1, color="C2", alpha=0.08)
    axes.axhline(least, color="C2", lw=0.8, ls="--")
    axes.set_xlim(left=0)
    axes.set_xlabel("share of a training step, base entropies known, %")
    axes.set_ylabel("kept: the lower of median split and chosen steps")
    axes.set_title("Nothing is inside the aim (shaded, above the line)" if not _reached(points, aim) else "Reached")
    figure.savefig(path, dpi=DPI)


def _reached(points: Sequence[Point], aim: tuple[float, float]) -> bool:
    return any(each.share <= aim[0] and each.agreement >= aim[1] for each in points)
