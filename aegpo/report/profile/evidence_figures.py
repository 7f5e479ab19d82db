"""Draws the evidence: spread of rewards beside Entropy(t), and every correlation with its interval."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from aegpo.report.plots import Drawing
from aegpo.report.profile.evidence import CHILDREN, Correlation, Evidence, PromptEvidence
from aegpo.report.style import INK, PALETTE, new_figure, top_legend, whole_ticks

READ, OTHER = PALETTE[1], PALETTE[0]


def drawings(evidence: Evidence) -> Iterator[Drawing]:
    """The plots of the evidence."""
    yield Drawing(
        "steps-evidence",
        "Entropy(t) and the spread of rewards",
        f"Left: standard deviation of rewards over {CHILDREN} noisy children of the trunk at each step, mean "
        "over prompts and two standard errors, and Entropy(t) of the block that is read, each on its own scale. "
        "Right: rank correlation of the two over a prompt's steps, mean over prompts with 95 % interval.",
        "Spread of rewards and entropy at every step, and their rank correlation for every block",
        lambda: draw_steps(evidence),
    )
    if evidence.by_prompt is not None:
        found = evidence.by_prompt
        yield Drawing(
            "prompts-evidence",
            "Delta-entropy and learning value",
            "Rank correlation over prompts with 95 % bootstrap interval; filled: holds once corrected for all "
            "comparisons.",
            "Rank correlations of delta-entropy with reward gain, spread in the group and squared gradient norm",
            lambda: draw_prompts(found, evidence.block),
        )


def draw_steps(evidence: Evidence) -> Any:
    """Curves, scaled, and correlations."""
    found = evidence.by_step
    figure = new_figure(10, 3.4)
    left, right = figure.subplots(1, 2, gridspec_kw={"width_ratios": [1.25, 1]})
    for table, color, name in (
        (found.reward_std, OTHER, "std of rewards"),
        (found.entropy[evidence.block], READ, f"entropy, {evidence.block}"),
    ):
        mean = table.mean(axis=0)
        error = 2 * table.std(axis=0, ddof=1) / np.sqrt(len(table)) if len(table) > 1 else 0.0
        bottom, span = mean.min(), float(np.ptp(mean)) or 1.0
        scaled, width = (mean - bottom) / span, error / span
        left.fill_between(found.steps, scaled - width, scaled + width, color=color, alpha=0.18, linewidth=0)
        label = f"{name} ({mean.min():.3g} to {mean.max():.3g})"
        left.plot(found.steps, scaled, color=color, marker="o", label=label)
    left.set_ylim(-0.25, 1.25)
    left.set_yticks([0, 1], ["lowest", "highest"])
    left.set_xlabel("denoising step")
    left.xaxis.set_major_locator(whole_ticks(10))
    _forest(right, found.along, [f"{each.predictor}" for each in found.along], evidence.block)
    right.set_xlabel("rank correlation with the std of rewards")
    top_legend(figure, left)
    return figure


def draw_prompts(found: PromptEvidence, block: str) -> Any:
    """A panel for each outcome."""
    outcomes = list(found.outcomes)
    each = [[row for row in found.correlations if row.outcome == outcome] for outcome in outcomes]
    figure = new_figure(1.6 + 2.9 * len(outcomes), 1.0 + 0.32 * len(each[0]))
    grid = figure.subplots(1, len(outcomes), squeeze=False, sharey=True)[0]
    for axes, rows, outcome in zip(grid, each, outcomes, strict=True):
        _forest(axes, rows, [row.predictor for row in rows], f"delta {block}")
        axes.set_title(outcome)
        axes.set_xlabel("rank correlation")
    return figure


def _forest(axes: Any, rows: Sequence[Correlation], names: Sequence[str], read: str) -> None:
    axes.axvline(0, color=INK, linewidth=1, zorder=1)
    for place, row in enumerate(rows):
        color = READ if row.predictor == read else OTHER
        if row.interval is not None:
            axes.plot([row.interval.low, row.interval.high], [place, place], color=color, linewidth=2.2)
        sure = row.p < 0.05 if row.p is not None else row.interval is not None and row.interval.excludes_zero
        axes.plot([row.rho], [place], "o", markersize=6, color=color, markerfacecolor=color if sure else "white")
    axes.set_yticks(range(len(rows)), names)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(-1, 1)
    axes.set_xticks([-1, -0.5, 0, 0.5, 1])
    axes.grid(visible=False, axis="y")
