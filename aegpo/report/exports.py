"""A report's numbers for other programs: tables for LaTeX, and tidy CSV, one observation a row.

`scores.csv`: a row for each place, label and arm: gains, with the interval for new seeds and new prompts.
`differences.csv`: a row for each place, label and comparison: p is corrected (Holm), the interval is over seeds.
`costs.csv`: a row for each arm. `curves.csv`: a row for each arm, label, seed and evaluation.

Places: `equal steps` is after the last step, `equal cost` when all have spent what the cheapest run spends in all.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from aegpo.core.files import write_atomically
from aegpo.report.contrasts import Contrast
from aegpo.report.csv_files import write_csv
from aegpo.report.glance import glance_tables
from aegpo.report.outcomes import outcome
from aegpo.report.recorded import Study
from aegpo.report.scores import Score
from aegpo.report.statistics import Interval
from aegpo.report.summary import Cost, Summary, learning_curves
from aegpo.report.tables import (
    Table,
    cost_table,
    equal_cost_tables,
    reach_tables,
    score_tables,
    signals_table,
)

SCORES = ("place", "label", "trained", "arm", "seeds", "base", "final", "gain", "gain_low", "gain_high")
DIFFERENCES = (
    *("place", "label", "arm", "reference", "seeds", "difference", "low", "high"),
    *("p_holm", "p_equal_holm", "margin", "smallest_detectable", "outcome"),
)
COSTS = (
    *("arm", "seeds", "steps", "forwards", "signal_forwards", "gradient_rows", "cost", "relative_cost"),
    *("training_seconds", "total_seconds"),
)
CURVES = ("arm", "label", "seed", "step", "cost_mean", "training_seconds_mean", "score")
CSV_FILES = ("scores.csv", "differences.csv", "costs.csv", "curves.csv")
TEX_FILE = "tables.tex"
_TEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}"}
_TEX |= {">": r"\textgreater{}", "|": r"\textbar{}", **{each: f"\\{each}" for each in "&%$#_{}"}}


def write_csvs(study: Study, summary: Summary, folder: Path) -> tuple[Path, ...]:
    """Writes the four files and returns their paths."""
    equal = summary.equal_cost
    scores = [("equal steps", each) for each in summary.scores]
    scores += [("equal cost", each) for each in equal.scores] if equal is not None else []
    found = [("equal steps", each) for each in summary.contrasts]
    found += [("equal cost", each) for each in equal.contrasts] if equal is not None else []
    paths = tuple(folder / name for name in CSV_FILES)
    write_csv(paths[0], SCORES, [_score(place, each) for place, each in scores])
    write_csv(paths[1], DIFFERENCES, [_difference(place, each) for place, each in found])
    write_csv(paths[2], COSTS, [_cost(each) for each in summary.costs])
    write_csv(paths[3], CURVES, _curves(study))
    return paths


def _ends(interval: Interval | None) -> tuple[float | None, float | None]:
    return (None, None) if interval is None else (interval.low, interval.high)


def _score(place: str, row: Score) -> Sequence[object]:
    trained = "yes" if row.trained else "no"
    gains = (row.base, row.final, row.gain, *_ends(row.gain_interval))
    return (place, row.label, trained, row.arm, len(row.seeds), *gains)


def _difference(place: str, each: Contrast) -> Sequence[object]:
    named = (place, each.label, each.arm, each.reference, len(each.seeds), each.mean, *_ends(each.over_seeds))
    return (*named, each.p_holm, each.p_equal_holm, each.margin, each.smallest_detectable, outcome(each))


def _cost(row: Cost) -> Sequence[object]:
    spent = (row.forwards, row.signal_forwards, row.gradient_rows, row.cost, row.relative_cost)
    return (row.arm, len(row.seeds), row.steps, *spent, row.training_seconds, row.total_seconds)


def _curves(study: Study) -> Iterator[Sequence[object]]:
    for curve in learning_curves(study):
        seeds = [run.seed for run in study.finished(curve.arm)]
        for label, table in curve.scores.items():
            for seed, scores in zip(seeds, table, strict=True):
                for step, cost, seconds, score in zip(curve.steps, curve.cost, curve.seconds, scores, strict=True):
                    yield curve.arm, label, seed, int(step), float(cost), float(seconds), float(score)


# --- LaTeX -----------------------------------------------------------------------------------------------------------


def write_latex(summary: Summary, folder: Path) -> Path:
    """Writes every table of the page to one file, and returns its path."""
    tables = [*glance_tables(summary), *score_tables(summary), *equal_cost_tables(summary)] if summary.scores else []
    tables += [cost_table(summary)] if summary.costs else []
    tables += [*reach_tables(summary), *([signals_table(summary)] if summary.signals else [])]
    head = f"% Tables of experiment {summary.name}, by aegpo report. They need \\usepackage{{booktabs}}.\n"
    path = folder / TEX_FILE
    write_atomically(path, (head + "\n".join(map(_latex, tables))).encode())
    return path


def _latex(table: Table) -> str:
    rows = [" & ".join(map(escaped, row)) + r" \\" for row in table.rows]
    slug = re.sub(r"[^a-z0-9]+", "-", table.title.lower()).strip("-")
    note = [rf"\par\smallskip\footnotesize {escaped(table.note)}"] if table.note else []
    lines = [
        r"\begin{table}",
        r"\centering\small",
        rf"\caption{{{escaped(table.title)}}}",
        rf"\label{{tab:{slug}}}",
        rf"\begin{{tabular}}{{l{'r' * (len(table.columns) - 1)}}}",
        r"\toprule",
        " & ".join(map(escaped, table.columns)) + r" \\",
        r"\midrule",
        *rows,
        r"\bottomrule",
        r"\end{tabular}",
        *note,
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def escaped(text: str) -> str:
    """A text as LaTeX sets it: no letter of it is a command; an interval does not begin an option of a row's end."""
    plain = "".join(_TEX.get(letter, letter) for letter in text)
    return f"{{{plain}}}" if plain.startswith("[") else plain
