"""The profile as text: tables for the terminal and the page alike, and curves as one line each."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from aegpo.core.records import FloatArray
from aegpo.report.profile.analysis import Analysis
from aegpo.report.tables import NONE, Table
from aegpo.report.wording import listing, plural, signed

SPARKS = "\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"  # eight bars from low to high
PLACES = 3  # decimals of nats: rows of float32 are good for 5 or more
LIST = 8  # prompts shown from either end, where not all are


def sparkline(curve: FloatArray) -> str:
    """A curve as bars from its lowest to its highest value; a flat one is all low."""
    low, span = float(curve.min()), float(np.ptp(curve))
    heights = np.zeros(len(curve)) if span == 0 else (curve - low) / span * (len(SPARKS) - 1)
    return "".join(SPARKS[round(height)] for height in heights)


def headline(analysis: Analysis) -> tuple[str, ...]:
    """What was profiled and what stands out, sentence by sentence."""
    return tuple(_headline(analysis))


def _headline(analysis: Analysis) -> Iterator[str]:
    curve, shares = analysis.shown.curves(analysis.block).mean(axis=0), analysis.chosen.mean(axis=0)
    number = int(analysis.chosen.sum(axis=1).max())
    usual = sorted(np.argsort(-shares, kind="stable")[:number].tolist())
    same = float((analysis.chosen == analysis.chosen[0]).all(axis=1).mean())
    peak = f"Entropy(t) of block {analysis.block} is highest at step {int(curve.argmax())} of {len(curve)}"
    yield f"{peak} ({curve.max():.{PLACES}f} nats) and lowest at step {int(curve.argmin())} ({curve.min():.{PLACES}f})."
    who = "entropy-peak, which this arm does not use," if analysis.selector_is_foreign else analysis.selector.kind
    yield (
        f"{who} chooses mostly steps {listing([str(step) for step in usual])}; {100 * same:.0f} % of the prompts get "
        "the same steps as the first one."
    )
    delta = analysis.delta(analysis.block)
    if delta is not None:
        mean = float(analysis.base.curves(analysis.block).mean())
        yield (
            f"Delta-entropy is {delta.mean():.{PLACES + 1}f} nats on average, {100 * delta.mean() / mean:.2f} % of the "
            f"base's entropy; from {delta.min():.{PLACES + 1}f} to {delta.max():.{PLACES + 1}f} over prompts."
        )


def spark_lines(analysis: Analysis, drawn: bool = True) -> Iterator[str]:
    """A line for each block: its mean curve, if it is to be drawn, its range and its highest step."""
    width = max(len(block) for block in analysis.shown.blocks)
    for block in analysis.shown.blocks:
        curve = analysis.shown.curves(block).mean(axis=0)
        ends = f"{curve.min():.{PLACES}f} to {curve.max():.{PLACES}f} nats, highest at step {int(curve.argmax())}"
        read = "  <- what this experiment reads" if block == analysis.block else ""
        line = f"  {sparkline(curve)}" if drawn else ""
        yield f"{block:<{width}}{line}  {ends}{read}"


def steps_table(analysis: Analysis) -> Table:
    """Entropy(t), a row a denoising step; a star marks a local maximum."""
    curve, base = (profile.curves(analysis.block).mean(axis=0) for profile in (analysis.shown, analysis.base))
    spread = (
        analysis.shown.curves(analysis.block).std(axis=0, ddof=1) if len(analysis.texts) > 1 else np.zeros_like(curve)
    )
    others = [block for block in analysis.shown.blocks if block != analysis.block]
    compared = ("base", "minus base") if analysis.policy is not None else ()
    rows = []
    for step, value in enumerate(curve):
        mark = " *" if step in analysis.peaks else ""
        cells = [f"{step}{mark}", f"{analysis.sigmas[step]:.3f}", f"{value:.{PLACES}f}", f"{spread[step]:.{PLACES}f}"]
        if compared:
            cells += [f"{base[step]:.{PLACES}f}", signed(value - base[step], PLACES + 1)]
        cells.append(f"{100 * analysis.chosen[:, step].mean():.0f} %")
        cells += [f"{analysis.shown.curves(block)[:, step].mean():.{PLACES}f}" for block in others]
        rows.append(tuple(cells))
    columns = ("step", "sigma", analysis.block, "sd over prompts", *compared, "chosen", *others)
    note = "Nats, mean over prompts, layers, heads and rows. *: a local maximum of the mean curve, ends included."
    return Table(f"Entropy(t), block {analysis.block}", columns, tuple(rows), note)


def prompts_table(analysis: Analysis, every: bool) -> Table | None:
    """Prompts from the one whose entropy moved most; the middle ones left out unless `every`."""
    delta = analysis.delta(analysis.block)
    if delta is None:
        return None
    order, counts = np.argsort(-delta, kind="stable"), analysis.counts
    shown = list(range(len(order)))
    if not every and len(order) > 2 * LIST:
        shown = [*range(LIST), *range(len(order) - LIST, len(order))]
    rows = []
    for place in shown:
        prompt = int(order[place])
        given = NONE if counts is None or not counts[prompt] else str(counts[prompt])
        steps = ", ".join(str(step) for step in np.flatnonzero(analysis.chosen[prompt]))
        rows.append((f"{place + 1}. {analysis.texts[prompt]}", f"{delta[prompt]:.{PLACES + 1}f}", given, steps))
    left_out = len(order) - len(shown)
    note = f"{plural(left_out, 'prompt')} in between: see prompts.csv. " if left_out else ""
    note += "Rollouts: if these prompts came in this order, a training step's at a time."
    options = analysis.options
    if (options.delta, options.base_on) != ("absolute", "own"):
        note += (
            f" They are given by delta {options.delta!r} with the base on the latents {options.base_on!r}; shown is "
        )
        note += "'absolute', each on its own."
    return Table("Delta-entropy of each prompt", ("prompt", "delta (nats)", "rollouts", "steps"), tuple(rows), note)


def layers_table(analysis: Analysis) -> Table:
    """Layers ranked by how much they vary over steps, and by how much they moved."""
    moved = sorted((layer.moved or 0.0 for layer in analysis.layers), reverse=True)
    rows = tuple(
        (
            layer.name,
            layer.kind,
            f"{layer.mean:.{PLACES}f}",
            f"{layer.varies:.{PLACES}f}",
            *(() if layer.moved is None else (f"{layer.moved:.{PLACES + 1}f}", str(1 + moved.index(layer.moved)))),
        )
        for layer in analysis.layers
    )
    compared = ("moved from base", "rank by moved") if analysis.policy is not None else ()
    columns = ("layer", "kind", "mean (nats)", "varies over steps", *compared)
    note = "Varies: standard deviation over steps of the mean curve. Moved: mean of |policy - base|."
    return Table(f"Layers, block {analysis.block}", columns, rows, note)


def tables(analysis: Analysis, every: bool) -> Iterator[Table]:
    """All tables; `every`: with all prompts."""
    yield steps_table(analysis)
    prompts = prompts_table(analysis, every)
    if prompts is not None:
        yield prompts
    yield layers_table(analysis)
