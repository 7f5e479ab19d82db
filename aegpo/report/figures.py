"""Draws the plots of the report; each function returns a matplotlib figure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from aegpo.core.records import FloatArray, IntArray
from aegpo.method.signals.entropy_options import ENTROPY, ENTROPY_DELTA
from aegpo.report.contrasts import Contrast
from aegpo.report.recorded import Study
from aegpo.report.recorded_run import IDLE_STAGES, RecordedRun
from aegpo.report.scores import Score
from aegpo.report.statistics import Interval
from aegpo.report.style import (
    BASELINE,
    GRID,
    INK,
    MARKERS,
    PALETTE,
    Look,
    label_first,
    looks,
    new_figure,
    share_limits,
    small_multiples,
    thousands,
    top_legend,
    whole_ticks,
    write_instead,
)
from aegpo.report.summary import Curve, Summary, curve_of, learning_curves

LONGEST_LABEL = 20  # letters of an arm's name beside its row

# --- curves ----------------------------------------------------------------------------------------------------------


def draw_curves(study: Study) -> Any:
    """Evaluation reward, a row a label; against steps, cost and seconds."""
    labels, finished = study.labels, {curve.arm: curve for curve in learning_curves(study)}
    band = 0.13 if len(study.arms) <= len(MARKERS) else 0.04  # opacity; many bands would hide the lines
    figure = new_figure(11, 0.7 + 2.5 * len(labels))
    grid = figure.subplots(len(labels), 3, squeeze=False, sharey="row", sharex="col")
    for row, label in zip(grid, labels, strict=True):
        for column, axes in enumerate(row):
            for arm, look in looks(study.arms).items():
                _draw_curve(axes, column, label, finished.get(arm), study.of(arm), look, band)
            _base_line(axes, study, label)
            axes.xaxis.set_major_locator(whole_ticks(5))
        role = "trained" if label in study.example.trained else "guard"
        row[0].set_ylabel(f"{label} ({role})")
    names = ("training step", "cost (forwards + 3 x gradient rows)", "training seconds")
    for axes, name in zip(grid[-1], names, strict=True):
        axes.set_xlabel(name)
        axes.xaxis.set_major_formatter(thousands())
    top_legend(figure, grid[0][0])
    return figure


def _draw_curve(
    axes: Any, column: int, label: str, curve: Curve | None, runs: Sequence[RecordedRun], look: Look, band: float
) -> None:
    """One arm: a band over its finished seeds, a dotted line for each run that is not."""
    if curve is not None and label in curve.scores:
        x, values = _x_axis(curve, column), curve.scores[label]
        axes.fill_between(x, values.min(axis=0), values.max(axis=0), color=look.color, alpha=band, linewidth=0)
        every = max(1, len(x) // 10)
        mean, dots = values.mean(axis=0), {"marker": look.marker, "markevery": every}
        axes.plot(x, mean, color=look.color, linestyle=look.line, label=curve.arm, **dots)
    begun = [run for run in runs if not run.finished and run.evaluations and label in run.evaluations[0].scores]
    for index, run in enumerate(begun):
        part = curve_of(run.arm, [run])
        name = run.arm if curve is None and index == 0 else None
        axes.plot(_x_axis(part, column), part.scores[label][0], ":", color=look.color, linewidth=1.4, label=name)


def _x_axis(curve: Curve, column: int) -> FloatArray:
    return (curve.steps, curve.cost, curve.seconds)[column]


def _base_line(axes: Any, study: Study, label: str) -> None:
    rows = [run.evaluations[-1].base_scores for run in study.runs.values() if run.evaluations]
    base = [row[label].mean() for row in rows if label in row]
    axes.axhline(float(np.mean(base)), color=BASELINE, linestyle=(0, (5, 4)), linewidth=1, zorder=1)


# --- gains -----------------------------------------------------------------------------------------------------------


def draw_gains(summary: Summary) -> Any:
    """Gains and differences with their intervals, a row a label; what is optimised at equal cost too."""
    shown = [(label, summary.under(label), summary.compared(label)) for label in summary.labels]
    if (equal := summary.equal_cost) is not None:
        label = summary.headline
        shown.insert(1, (f"{label} at equal cost", equal.under(label), equal.compared(label)))
    heights = [0.75 + 0.3 * max(len(summary.arms), len(contrasts)) for _, _, contrasts in shown]
    figure = new_figure(11, 0.5 + sum(heights))
    columns = 2 if any(contrasts for _, _, contrasts in shown) else 1
    grid = figure.subplots(len(shown), columns, squeeze=False, height_ratios=heights)
    for row, (label, scores, contrasts) in zip(grid, shown, strict=True):
        _draw_gains(row[0], summary.arms, scores)
        row[0].set_title(f"{label}: gain over the base")
        for right in row[1:]:
            _draw_differences(right, summary.arms, contrasts)
            right.set_title(f"{label}: differences of gains")
    return figure


def _draw_gains(axes: Any, arms: Sequence[str], scores: Sequence[Score]) -> None:
    _rows_around_zero(axes, [_short(arm) for arm in arms])
    for row in scores:
        look = looks(arms)[row.arm]
        _whisker(axes, arms.index(row.arm), row.gain, row.gain_interval, row.gain_by_seed, look)


def _draw_differences(axes: Any, arms: Sequence[str], contrasts: Sequence[Contrast]) -> None:
    if not contrasts:
        write_instead(axes, "nothing to compare")
        return
    _rows_around_zero(axes, [f"{_short(each.arm)} - {_short(each.reference)}" for each in contrasts])
    for place, each in enumerate(contrasts):
        if each.margin is not None:
            axes.barh([place], [2 * each.margin], left=-each.margin, height=0.8, color=GRID, zorder=0)
        _whisker(axes, place, each.mean, each.over_seeds, each.by_seed, looks(arms)[each.arm])


def _short(name: str) -> str:
    """A name with its middle left out where it would take the room of the plot."""
    return name if len(name) <= LONGEST_LABEL else f"{name[: LONGEST_LABEL - 12]}...{name[-9:]}"


def _rows_around_zero(axes: Any, names: Sequence[str]) -> None:
    axes.axvline(0, color=INK, linewidth=1, zorder=1)
    axes.grid(visible=False, axis="y")
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)


def _whisker(
    axes: Any, place: int, mean: float, interval: Interval | None, by_seed: Sequence[float], look: Look
) -> None:
    if interval is not None:
        axes.plot([interval.low, interval.high], [place, place], color=look.color, linewidth=2.2, solid_capstyle="butt")
    axes.plot(list(by_seed), [place + 0.25] * len(by_seed), linestyle="", marker=".", color=look.color, alpha=0.7)
    axes.plot([mean], [place], marker=look.marker, markersize=7, color=look.color)


# --- steps and allocation --------------------------------------------------------------------------------------------


def draw_steps(study: Study) -> Any:
    """Entropy(t) with the chosen steps, and how often each was chosen; a column an arm."""
    arms = [arm for arm in study.arms if any(run.steps for run in study.of(arm))]
    entropies = {arm: _entropies(study.of(arm)) for arm in arms}
    measured = any(len(table) for table in entropies.values())
    figure, rows = small_multiples(len(arms), 2 if measured else 1)
    for index, arm in enumerate(arms):
        look, chosen = looks(study.arms)[arm], _chosen(study.of(arm))
        axes = rows[-1][index]
        axes.bar(range(len(chosen)), 100 * chosen, color=look.color, width=0.8)
        axes.set_ylim(0, 105)
        axes.set_xlabel("denoising step")
        axes.xaxis.set_major_locator(whole_ticks(6))
        rows[0][index].set_title(arm)
        if measured:
            _draw_entropy(rows[0][index], entropies[arm], chosen, look)
    share_limits(rows[0])
    label_first(rows, ("entropy (nats)", "chosen (% of prompts)") if measured else ("chosen (% of prompts)",))
    return figure


def _draw_entropy(axes: Any, table: FloatArray, chosen: FloatArray, look: Look) -> None:
    if not len(table):
        write_instead(axes, "not measured")
        return
    x, mean = np.arange(table.shape[1]), table.mean(axis=0)
    low, high = np.percentile(table, [10, 90], axis=0)
    axes.fill_between(x, low, high, color=look.color, alpha=0.18, linewidth=0)
    axes.plot(x, mean, color=look.color)
    axes.scatter(x, mean, s=90 * chosen, color=look.color, zorder=3, linewidths=0)
    axes.xaxis.set_major_locator(whole_ticks(6))


def _entropies(runs: Sequence[RecordedRun]) -> FloatArray:  # (prompts of all steps, T)
    tables = [row.signals[ENTROPY] for run in runs for row in run.steps if ENTROPY in row.signals]
    return np.concatenate(tables) if tables else np.zeros((0, 0))


def _chosen(runs: Sequence[RecordedRun]) -> FloatArray:  # (T,) share of prompts
    size = int(runs[0].experiment["rollouts"]["denoising_steps"])
    prompts = [steps for run in runs for row in run.steps for steps in row.selected]
    times = np.bincount([step for steps in prompts for step in steps], minlength=size)
    share: FloatArray = times / max(1, len(prompts))
    return share


def draw_allocation(study: Study) -> Any:
    """Rollouts per prompt as a histogram, and against delta-entropy; a column an arm."""
    arms = [arm for arm in study.arms if any(run.steps for run in study.of(arm))]
    points = {arm: _allocated(study.of(arm)) for arm in arms}
    measured = any(len(table) for _, table in points.values())
    figure, rows = small_multiples(len(arms), 2 if measured else 1)
    largest = max(int(counts.max()) for counts, _ in points.values())
    for index, arm in enumerate(arms):
        (counts, related), look = points[arm], looks(study.arms)[arm]
        share = 100 * np.bincount(counts, minlength=largest + 1) / len(counts)
        rows[0][index].bar(range(largest + 1), share, color=look.color, width=0.8)
        rows[0][index].set_title(arm)
        rows[0][index].set_xlabel("rollouts of a prompt")
        rows[0][index].xaxis.set_major_locator(whole_ticks(6))
        if measured:
            _draw_related(rows[1][index], related, look)
    rows[0][0].set_ylabel("prompts (%)")  # each panel on its own scale: one bar of 100 % would flatten the others
    if measured:
        share_limits(rows[1])
        label_first(rows[1:], ("rollouts of a prompt",))
        figure.supxlabel("delta-entropy / its mean size in the step", fontsize="medium")  # too long for each panel
    return figure


def _allocated(runs: Sequence[RecordedRun]) -> tuple[IntArray, FloatArray]:
    """Counts of all prompts (n,), and (m, 2) relative delta-entropy and count where delta is known."""
    rows = [row for run in runs for row in run.steps]
    counts = np.concatenate([row.counts for row in rows]).astype(np.int64)
    related = [
        np.stack([delta / np.abs(delta).mean(), np.asarray(row.counts, dtype=np.float64)], axis=1)
        for row in rows
        # at first the policy is the base
        if (delta := row.signals.get(ENTROPY_DELTA)) is not None and np.abs(delta).mean() > 0
    ]
    return counts, np.concatenate(related) if related else np.zeros((0, 2))


def _draw_related(axes: Any, related: FloatArray, look: Look) -> None:
    if not len(related):
        write_instead(axes, "not measured")
        return
    axes.scatter(related[:, 0], related[:, 1], s=9, alpha=0.35, color=look.color, linewidths=0, rasterized=True)


# --- seconds ---------------------------------------------------------------------------------------------------------


def draw_seconds(summary: Summary) -> Any:
    """Seconds of a training step by stage, stacked, a bar an arm."""
    stages = list(dict.fromkeys(stage for cost in summary.costs for stage in cost.stage_seconds))
    order = sorted(stages, key=lambda stage: stage in IDLE_STAGES)
    figure = new_figure(11, 1.2 + 0.36 * len(summary.costs))
    axes = figure.subplots()
    left = np.zeros(len(summary.costs))
    for stage, color in zip(order, _stage_colors(order), strict=True):
        values = np.array([cost.stage_seconds.get(stage, 0.0) for cost in summary.costs])
        axes.barh(range(len(values)), values, left=left, color=color, height=0.65, label=stage)
        left += values
    axes.set_yticks(range(len(summary.costs)), [cost.arm for cost in summary.costs])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("seconds of a training step")
    top_legend(figure, axes)
    return figure


def _stage_colors(stages: Sequence[str]) -> list[str]:
    known = dict(zip(IDLE_STAGES, (BASELINE, "#bbbbbb"), strict=True))
    return [known.get(stage, PALETTE[index % len(PALETTE)]) for index, stage in enumerate(stages)]


# --- noise -----------------------------------------------------------------------------------------------------------


def draw_noise(summary: Summary) -> Any:
    """The noise left in training images, a row an arm."""
    arms = [each.arm for each in summary.noise]
    figure = new_figure(11, 0.9 + 0.36 * len(arms))
    axes = figure.subplots()
    axes.axvline(0, color=INK, linewidth=1, zorder=1)
    for place, each in enumerate(summary.noise):
        _whisker(axes, place, each.mean, Interval(each.low, each.high), (), looks(summary.arms)[each.arm])
    axes.set_yticks(range(len(arms)), arms)
    axes.set_ylim(len(arms) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("standard deviation, in units of the start noise")
    return figure
