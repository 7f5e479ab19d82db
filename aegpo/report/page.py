"""The report as a page: what its template shows, and the samples."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from aegpo.report.glance import WORDS, glance_tables
from aegpo.report.glossary import glossary
from aegpo.report.in_numbers import in_numbers
from aegpo.report.plots import Plot
from aegpo.report.recorded import Study
from aegpo.report.recorded_run import RecordedRun
from aegpo.report.style import looks
from aegpo.report.summary import Summary
from aegpo.report.tables import (
    cost_table,
    difference_tables,
    equal_cost_tables,
    reach_tables,
    score_tables,
    setting,
    signals_table,
    versions_table,
)
from aegpo.report.templating import render
from aegpo.report.verdict import plainly

LARGEST_GRID = 768  # pixels; larger sample grids are made smaller for the page, the files stay as they are
OF_SCORES = ("gains", "curves")  # plots that follow the scores


@dataclass(frozen=True)
class Sample:
    """A grid of images with its caption."""

    caption: str
    source: str  # PNG in base64


def page(study: Study, summary: Summary, plots: Sequence[Plot]) -> str:
    """The whole page."""
    return render(
        "report.html",
        {
            "name": study.name,
            "verdict": plainly(summary),
            "about": tuple(summary.about.items()),
            "glance": tuple(glance_tables(summary)),
            "glance_words": WORDS,
            "numbers": tuple(in_numbers(summary)),
            "notes": summary.notes,
            "looks": looks(study.arms),
            "scores": tuple(score_tables(summary)) if summary.scores else (),
            "equal_cost": tuple(equal_cost_tables(summary)),
            "of_scores": [plot for plot in plots if plot.name in OF_SCORES],
            "costs": (*([cost_table(summary)] if summary.costs else []), *reach_tables(summary)),
            "signals": signals_table(summary) if summary.signals else None,
            "others": [plot for plot in plots if plot.name not in OF_SCORES],
            "samples": _samples(study),
            "prompts": _prompts(study),
            "glossary": glossary(summary),
            "setting": tuple(setting(study, summary)),
            "differences": tuple(difference_tables(study)),
            "versions": versions_table(study),
        },
    )


# --- samples ---------------------------------------------------------------------------------------------------------


def _samples(study: Study) -> list[Sample]:
    runs = [study.of(arm)[0] for arm in study.arms if study.of(arm) and len(study.of(arm)[0].images) > 1]
    if not runs:
        return []
    same = len({run.images[0].read_bytes() for run in runs}) == 1
    shown = [_sample(runs[0], 0, "before training, every arm")] if same else []
    for run in runs:
        shown += [] if same else [_sample(run, 0, f"{run.arm}, before training")]
        shown.append(_sample(run, -1, f"{run.arm}, seed {run.seed}, step {_step(run.images[-1])}"))
    return shown


def _prompts(study: Study) -> Sequence[str]:
    """Those of the samples."""
    kept = study.example.experiment["evaluation"].get("images", 16)
    return study.example.evaluations[0].prompts[:kept] if study.example.evaluations else ()


def _sample(run: RecordedRun, index: int, caption: str) -> Sample:
    return Sample(caption, base64.b64encode(_small(run.images[index])).decode())


def _step(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))


def _small(path: Path) -> bytes:
    from PIL import Image

    with Image.open(path) as image:
        if max(image.size) <= LARGEST_GRID:
            return path.read_bytes()
        small = image.convert("RGB")
        small.thumbnail((LARGEST_GRID, LARGEST_GRID))
        stream = io.BytesIO()
        small.save(stream, format="PNG", optimize=True)
        return stream.getvalue()
