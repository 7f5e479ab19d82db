"""The plots of the report: each is drawn once and saved as PNG, for the folder, and as SVG, for the page."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aegpo.report.figures import draw_allocation, draw_curves, draw_gains, draw_noise, draw_seconds, draw_steps
from aegpo.report.recorded import Study
from aegpo.report.style import DPI, STYLE
from aegpo.report.summary import Summary
from aegpo.report.tables import NOISE


@dataclass(frozen=True)
class Plot:
    """One plot of the page."""

    name: str  # of the file
    title: str
    caption: str
    alternative: str  # what a reader who cannot see it is told
    svg: str


def draw_plots(study: Study, summary: Summary, folder: Path, kinds: Sequence[str] = ("png",)) -> tuple[Plot, ...]:
    """Draws every plot there is data for; writes `folder`/NAME.KIND and returns the plots for the page.

    Args:
        study: the runs.
        summary: their numbers.
        folder: where files go.
        kinds: of files: png, svg, pdf.
    """
    return save_drawings(_drawings(study, summary), folder, kinds)


@dataclass(frozen=True)
class Drawing:
    """A plot that is still to be drawn."""

    name: str
    title: str
    caption: str
    alternative: str
    draw: Callable[[], Any]  # returns the matplotlib figure


def _drawings(study: Study, summary: Summary) -> Iterator[Drawing]:
    yield from _of_scores(study, summary)
    if any(run.steps for arm in study.arms for run in study.of(arm)):
        yield from _of_decisions(study)
    yield from _of_costs(summary)


def _of_scores(study: Study, summary: Summary) -> Iterator[Drawing]:
    if any(len(run.evaluations) > 1 for run in study.runs.values()):
        yield Drawing(
            "curves",
            "Reward on held-out prompts",
            "Line: mean over the finished seeds. Band: lowest to highest seed. Dotted: a run that is not finished. "
            "Dashed grey: the base model. Cost counts a frozen policy at a trained edge "
            "as one more. Seconds are those of training steps, without evaluations and checkpoints.",
            "Evaluation reward of every arm against training steps, cost and seconds",
            lambda: draw_curves(study),
        )
    if summary.scores:
        yield Drawing(
            "gains",
            "Gains and differences",
            "Left: gain over the base, 95 % CI for new seeds and new prompts. Right: differences of gains, 95 % CI "
            "over seeds; the pale bar is the margin, within which arms count as equal. Small dots: single seeds.",
            "Gain of every arm with its interval, and the differences that are compared",
            lambda: draw_gains(summary),
        )


def _of_decisions(study: Study) -> Iterator[Drawing]:
    yield Drawing(
        "steps",
        "Attention entropy and the steps chosen",
        "Above: Entropy(t), mean over prompts and training steps; band: 10th to 90th percentile; the larger a dot, "
        "the more often the step was chosen. Below: share of prompts for which a step was chosen. Denoising runs "
        "from noise, left, to image, right.",
        "Entropy at every denoising step, and how often each was chosen, per arm",
        lambda: draw_steps(study),
    )
    if not _shared_out(study):
        return
    yield Drawing(
        "allocation",
        "How rollouts were allocated",
        "Above: share of prompts that got so many rollouts in a step, each panel on its own scale. Below, for "
        "arms that measure entropy: rollouts of a prompt against its delta-entropy over the mean size in its step.",
        "Histogram of rollouts per prompt, and rollouts against delta-entropy, per arm",
        lambda: draw_allocation(study),
    )


def _shared_out(study: Study) -> bool:
    """True if some arm gave its prompts different numbers of rollouts."""
    counts = ({count for row in run.steps for count in row.counts} for arm in study.arms for run in study.of(arm))
    return any(len(found) > 1 for found in counts)


def _of_costs(summary: Summary) -> Iterator[Drawing]:
    if any(cost.stage_seconds for cost in summary.costs):
        yield Drawing(
            "seconds",
            "Where the time goes",
            "Wall-clock seconds of a training step by stage, mean over steps and finished seeds; evaluations and "
            "checkpoints are spread over all steps.",
            "Seconds per training step by stage, per arm",
            lambda: draw_seconds(summary),
        )
    if summary.noise:
        yield Drawing(
            "noise",
            "Noise left in training images",
            f"{NOISE} Dot: mean over training steps; line: 10th to 90th percentile.",
            "Noise that stochastic steps left in the images, per arm",
            lambda: draw_noise(summary),
        )


def save_drawings(drawings: Iterable[Drawing], folder: Path, kinds: Sequence[str] = ("png",)) -> tuple[Plot, ...]:
    """Draws each in the style of the report; writes `folder`/NAME.KIND and returns the plots for a page."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        return tuple(_save(drawing, folder, kinds) for drawing in drawings)


def _save(drawing: Drawing, folder: Path, kinds: Sequence[str]) -> Plot:
    import matplotlib

    figure = drawing.draw()
    if "png" in kinds:
        _save_png(figure, folder / f"{drawing.name}.png")
    if "pdf" in kinds:
        figure.savefig(folder / f"{drawing.name}.pdf", facecolor="white", metadata={"CreationDate": None})
    stream = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": drawing.name, "svg.id": drawing.name}):
        if "svg" in kinds:
            figure.savefig(folder / f"{drawing.name}.svg", facecolor="white", metadata={"Date": None})
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    svg = stream.getvalue()
    return Plot(drawing.name, drawing.title, drawing.caption, drawing.alternative, svg[svg.index("<svg") :])


def _save_png(figure: Any, path: Path) -> None:
    """Saves with a palette of 256 colours: a third of the size, and a plot has few."""
    from PIL import Image

    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=DPI, facecolor="white")
    with Image.open(stream) as image:
        image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
