"""Draws the plots of a profile; each function returns a matplotlib figure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from aegpo.core.records import FloatArray
from aegpo.report.plots import Drawing
from aegpo.report.profile.analysis import Analysis
from aegpo.report.profile.measure import Profile
from aegpo.report.style import BASELINE, INK, PALETTE, new_figure, top_legend, whole_ticks

HEAT, CHANGE = "cividis", "RdBu_r"
MAPPED = 4  # prompts whose entropy maps are drawn
MAP_STEPS = 4
LOW, HIGH = PALETTE[0], PALETTE[1]


def drawings(analysis: Analysis) -> Iterator[Drawing]:
    """Every plot there is data for."""
    yield from _of_entropy(analysis)
    yield from _of_attention(analysis)


def _of_entropy(analysis: Analysis) -> Iterator[Drawing]:
    yield Drawing(
        "entropy",
        "Entropy(t)",
        "Line: mean over prompts; band: 10th to 90th percentile; dashed: the base. The larger a dot, the more "
        "prompts for which the step would be chosen. Denoising runs from noise, left, to image, right.",
        "Attention entropy at every denoising step, a panel for each block",
        lambda: draw_entropy(analysis),
    )
    yield Drawing(
        "layers",
        "Layers and steps",
        f"Entropy of block {analysis.block} in nats, mean over prompts"
        + ("; right: policy minus base." if analysis.policy is not None else "."),
        "Attention entropy of every layer at every denoising step",
        lambda: draw_layers(analysis),
    )
    if analysis.delta(analysis.block) is not None:
        yield Drawing(
            "delta",
            "Delta-entropy of each prompt",
            "Prompts from the one that moved most. Colour: rollouts the experiment's allocator would give it if these "
            "prompts came in this order, a training step's at a time; the median that splits them is that of the step.",
            "Delta-entropy of each prompt, sorted, with its rollouts",
            lambda: draw_delta(analysis),
        )


def _of_attention(analysis: Analysis) -> Iterator[Drawing]:
    if any(block.count("-") for block in analysis.shown.blocks):
        yield Drawing(
            "blocks",
            "Where attention goes",
            "Share of attention that image rows, left, and text rows, right, give to image and to text keys; mean over "
            "prompts and layers; dashed: the base.",
            "Probability mass between image and text tokens at every denoising step",
            lambda: draw_masses(analysis),
        )
    if analysis.shown.maps is not None:
        yield Drawing(
            "maps",
            "Which tokens are undecided",
            "Entropy of each image token's attention, mean over layers and heads, laid over the image this trajectory "
            "ends at; bright: high. Each panel on its own scale, printed above in nats.",
            "Maps of attention entropy over generated images at some denoising steps",
            lambda: draw_maps(analysis),
        )


def draw_entropy(analysis: Analysis) -> Any:
    """Entropy(t) of every block, a panel each; the block that is read comes first."""
    blocks = sorted(analysis.shown.blocks, key=lambda block: block != analysis.block)
    columns = min(3, len(blocks))
    rows = -(-len(blocks) // columns)
    figure = new_figure(0.6 + 3.5 * columns, 0.7 + 2.5 * rows)
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, block in zip(grid, blocks, strict=False):
        _draw_curves(axes, analysis, block)
        axes.set_title(f"{block} (read)" if block == analysis.block else block)
        axes.xaxis.set_major_locator(whole_ticks(6))
        axes.set_xlabel("denoising step")
    for axes in grid[len(blocks) :]:
        axes.set_axis_off()
    for axes in grid[::columns]:
        axes.set_ylabel("entropy (nats)")
    top_legend(figure, grid[0])
    return figure


def _draw_curves(axes: Any, analysis: Analysis, block: str) -> None:
    table = analysis.shown.curves(block)
    x, mean, color = np.arange(table.shape[1]), table.mean(axis=0), PALETTE[0]
    low, high = np.percentile(table, [10, 90], axis=0)
    axes.fill_between(x, low, high, color=color, alpha=0.18, linewidth=0)
    axes.plot(x, mean, color=color, label="policy" if analysis.policy is not None else "base")
    if block == analysis.block:
        axes.scatter(x, mean, s=110 * analysis.chosen.mean(axis=0), color=HIGH, zorder=3, linewidths=0, label="chosen")
    if analysis.policy is not None:
        dashes = (0, (4, 3))
        axes.plot(x, analysis.base.curves(block).mean(axis=0), color=BASELINE, linestyle=dashes, label="base")


def draw_layers(analysis: Analysis) -> Any:
    """Layer by step, of the policy and of its difference to the base."""
    chosen = [place for place, name in enumerate(analysis.shown.layers) if any(x.name == name for x in analysis.layers)]
    names = [analysis.shown.layers[place] for place in chosen]

    def table(profile: Profile) -> FloatArray:  # (layers, T)
        mean: FloatArray = profile.blocks[analysis.block].entropy[:, :, chosen].mean(axis=0).T
        return mean

    panels = 1 if analysis.policy is None else 2
    figure = new_figure(2.2 + 4.4 * panels, 1.3 + max(1.2, 0.26 * len(names)))
    grid = figure.subplots(1, panels, squeeze=False, sharey=True)[0]
    _heat(figure, grid[0], table(analysis.shown), "entropy (nats)", HEAT)
    grid[0].set_yticks(range(len(names)), names)
    if analysis.policy is not None:
        moved = table(analysis.policy) - table(analysis.base)
        _heat(figure, grid[1], moved, "policy - base (nats)", CHANGE, float(np.abs(moved).max()))
    return figure


def _heat(figure: Any, axes: Any, table: FloatArray, name: str, colors: str, around_zero: float | None = None) -> None:
    limits = {} if around_zero is None else {"vmin": -max(around_zero, 1e-9), "vmax": max(around_zero, 1e-9)}
    image = axes.imshow(table, aspect="auto", cmap=colors, interpolation="nearest", **limits)
    axes.grid(visible=False)
    axes.set_xlabel("denoising step")
    axes.xaxis.set_major_locator(whole_ticks(8))
    bar = figure.colorbar(image, ax=axes, label=name)
    bar.outline.set_visible(False)


def draw_delta(analysis: Analysis) -> Any:
    """Sorted bars, coloured by what the allocator would give."""
    delta = analysis.delta(analysis.block)
    assert delta is not None, "drawn for runs only"
    order = np.argsort(-delta, kind="stable")
    counts = np.zeros(len(delta), dtype=np.int64) if analysis.counts is None else analysis.counts
    figure = new_figure(9, 3.1)
    axes = figure.subplots()
    for index, number in enumerate(sorted(set(counts.tolist()))):
        places = np.flatnonzero(counts[order] == number)
        color = BASELINE if number == 0 else PALETTE[index % len(PALETTE)]
        label = "not allocated by entropy" if number == 0 else f"{number} rollouts"
        axes.bar(places, delta[order][places], width=0.85, color=color, label=label)
    median = float(np.median(delta))
    axes.axhline(median, color=INK, linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate("median", (len(delta) - 0.5, median), xytext=(0, 3), textcoords="offset points", ha="right")
    axes.set_xlabel("prompts, from the one that moved most")
    axes.set_ylabel("delta-entropy (nats)")
    axes.grid(visible=False, axis="x")
    axes.xaxis.set_major_locator(whole_ticks(8))
    top_legend(figure, axes)
    return figure


def draw_masses(analysis: Analysis) -> Any:
    """What image rows and text rows give to image and to text keys."""
    figure = new_figure(9, 3.1)
    grid = figure.subplots(1, 2, sharey=True)
    for axes, rows in zip(grid, ("image", "text"), strict=True):
        for color, keys in zip((PALETTE[0], PALETTE[1]), ("image", "text"), strict=True):
            _draw_mass(axes, analysis, f"{rows}-{keys}", color, f"to {keys}")
        axes.set_title(f"{rows} rows")
        axes.set_ylim(0, 1)
        axes.set_xlabel("denoising step")
        axes.xaxis.set_major_locator(whole_ticks(6))
    grid[0].set_ylabel("share of attention")
    top_legend(figure, grid[0])
    return figure


def _draw_mass(axes: Any, analysis: Analysis, block: str, color: str, label: str) -> None:
    def mean(profile: Profile) -> FloatArray:  # (T,)
        shares: FloatArray = np.nanmean(profile.blocks[block].mass, axis=(0, 2))
        return shares

    axes.plot(mean(analysis.shown), color=color, label=label)
    if analysis.policy is not None:
        axes.plot(mean(analysis.base), color=color, linestyle=(0, (4, 3)), alpha=0.7)


def draw_maps(analysis: Analysis) -> Any:
    """Entropy over generated images: a row a prompt, a column a step."""
    maps, images = analysis.shown.maps, analysis.shown.images
    assert maps is not None, "drawn where there are maps"
    count, steps = min(MAPPED, len(maps)), _map_steps(analysis)
    figure = new_figure(1.0 + 1.75 * (1 + len(steps)), 0.3 + 2.05 * count)
    grid = figure.subplots(count, 1 + len(steps), squeeze=False)
    for axes in grid.flatten():
        axes.set_axis_off()
    for prompt, row in enumerate(grid):
        image = images[prompt].transpose(1, 2, 0)
        row[0].imshow(image, interpolation="nearest")
        row[0].set_title(_short(analysis.texts[prompt]), fontsize=7.5, fontweight="normal")
        for axes, step in zip(row[1:], steps, strict=True):
            _draw_map(axes, image, maps[prompt, step], step)
    return figure


def _map_steps(analysis: Analysis) -> list[int]:
    """The steps chosen most often, at most MAP_STEPS, in order; the last step too, for comparison."""
    shares = analysis.chosen.mean(axis=0)
    often = np.argsort(-shares, kind="stable")[:MAP_STEPS]
    return sorted({*(int(step) for step in often if shares[step] > 0), len(shares) - 1})


def _draw_map(axes: Any, image: FloatArray, tokens: FloatArray, step: int) -> None:
    height, width = image.shape[:2]
    grey = image.mean(axis=2)
    axes.imshow(grey, cmap="gray", vmin=0, vmax=1, interpolation="nearest", extent=(0, width, height, 0))
    axes.imshow(tokens, cmap="inferno", alpha=0.62, interpolation="nearest", extent=(0, width, height, 0))
    axes.set_title(f"step {step}: {tokens.min():.2f}-{tokens.max():.2f}", fontsize=7.5, fontweight="normal")


def _short(text: str, width: int = 26) -> str:
    """A prompt in at most two lines."""
    words, lines = text.split(), [""]
    for word in words:
        if len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines[:2]) + (" ..." if len(lines) > 2 else "")
