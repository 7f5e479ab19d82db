"""How every plot of the report looks: palette, type, ticks and small multiples.

The palette is Paul Tol's "bright" (2021), safe for colour-blind readers, with grey for the first arm, which the others
are compared to; markers tell arms apart without colour. Ink and grid are colours the page replaces by its own, so that
plots follow a light or dark theme.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

INK, GRID = "#24292e", "#d9dde2"
BASELINE = "#888888"
PALETTE = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377")
MARKERS = "osD^vPX"
LINES = ("-", (0, (4, 1.5)), (0, (6, 1.5, 1, 1.5)))  # once all colours are taken
DPI = 110
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "text.parse_math": False,  # names of arms and rewards are text, dollars included
    "svg.fonttype": "path",
    "figure.constrained_layout.use": True,
}


@dataclass(frozen=True)
class Look:
    """Colour, marker and line of an arm, the same in every plot."""

    color: str
    marker: str
    line: Any = "-"  # as matplotlib takes it


def looks(arms: Sequence[str]) -> dict[str, Look]:
    """How each arm is drawn."""
    colors = (BASELINE, *(PALETTE[index % len(PALETTE)] for index in range(len(arms))))
    lines = (LINES[0], *(LINES[index // len(PALETTE) % len(LINES)] for index in range(len(arms))))
    return {arm: Look(colors[index], MARKERS[index % len(MARKERS)], lines[index]) for index, arm in enumerate(arms)}


def new_figure(width: float, height: float) -> Any:
    """An empty figure, in inches; never pyplot, which keeps global state and may open windows."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure


def top_legend(figure: Any, axes: Any) -> None:
    """The legend of one panel, above all panels, where it covers no data."""
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        figure.legend(
            handles, labels, loc="outside upper center", ncols=min(6 if len(labels) <= 12 else 7, len(labels))
        )


def whole_ticks(number: int) -> Any:
    """At most so many ticks, at whole numbers."""
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(number, integer=True)


def thousands() -> Any:
    """Tick labels 500, 1.5k, 250k."""
    from matplotlib.ticker import FuncFormatter

    return FuncFormatter(lambda value, _: f"{value / 1000:g}k" if abs(value) >= 1000 else f"{value:g}")


def small_multiples(columns: int, rows: int) -> tuple[Any, Any]:
    """A figure and its rows of panels, a column an arm."""
    figure = new_figure(min(22.0, max(5.0, 0.6 + 2.2 * columns)), 0.5 + 2.1 * rows)
    return figure, figure.subplots(rows, columns, squeeze=False)


def share_limits(row: Sequence[Any]) -> None:
    """The same axes for all panels of a row that show data."""
    drawn = [axes for axes in row if axes.has_data()]
    horizontal, vertical = ([axes.get_xlim() for axes in drawn], [axes.get_ylim() for axes in drawn])
    for axes in drawn:
        axes.set_xlim(min(low for low, _ in horizontal), max(high for _, high in horizontal))
        axes.set_ylim(min(low for low, _ in vertical), max(high for _, high in vertical))


def label_first(rows: Any, names: Sequence[str]) -> None:
    """y labels on the first panel of each row that shows data, only there."""
    for row, name in zip(rows, names, strict=False):
        drawn = [axes for axes in row if axes.has_data()]
        for axes in drawn[1:]:
            axes.tick_params(labelleft=False)
        for axes in drawn[:1]:
            axes.set_ylabel(name)


def write_instead(axes: Any, words: str) -> None:
    """Words in place of a panel that has nothing to show."""
    axes.set_axis_off()
    axes.text(0.5, 0.5, words, ha="center", va="center", transform=axes.transAxes, alpha=0.6)
