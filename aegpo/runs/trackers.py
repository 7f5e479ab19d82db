"""Trackers: observers that record a run or show it; a resumed run is recorded as if it never broke."""

from __future__ import annotations

import hashlib
import io
import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from aegpo.core.files import write_atomically
from aegpo.core.hookspecs import Outcome, hookimpl
from aegpo.core.parts import TrackerSpec
from aegpo.core.reports import Evaluation, RunInfo, StepReport
from aegpo.errors import AegpoError
from aegpo.runs.filmstrips import side_by_side
from aegpo.runs.records import RowFile
from aegpo.runs.resuming import EVALUATIONS, IMAGES, METRICS, TIMING, go_on, image_name

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor
    from torch.utils.tensorboard import SummaryWriter

    from aegpo.runs.progress import Display, Standing

_GAP, _WIDE_GAP = 2, 8  # pixels between the images of a grid; between strips of videos
_TILE = 96  # images of fewer pixels are enlarged by whole factors up to this size


class ConsoleTracker(TrackerSpec):
    """Reward, forwards and time left: a bar in a terminal, a line for each step anywhere else."""

    kind: Literal["console"] = "console"

    def build(self, folder: Path) -> ConsoleObserver:
        """An observer that prints to stdout."""
        from rich.console import Console

        return ConsoleObserver(Console())


class JsonlTracker(TrackerSpec):
    """The record of a run: one JSON row a step, evaluations, timings and image grids; the report reads it."""

    kind: Literal["jsonl"] = "jsonl"
    on_error: Literal["stop"] = Field("stop", description="a run does not go on without its record")

    def build(self, folder: Path) -> JsonlObserver:
        """An observer that writes into the run's folder."""
        from rich.console import Console

        console = Console(stderr=True)
        return JsonlObserver(folder, lambda line: console.print(line, soft_wrap=True, markup=False, highlight=False))


class TensorboardTracker(TrackerSpec):
    """Curves and image grids for TensorBoard, in the folder `tensorboard` of the run."""

    kind: Literal["tensorboard"] = "tensorboard"

    def build(self, folder: Path) -> TensorboardObserver:
        """An observer that writes event files.

        Raises:
            AegpoError: if TensorBoard is not installed.
        """
        try:
            import tensorboard  # noqa: F401 - torch reports its absence late and in other words
        except ImportError as error:
            raise AegpoError(
                "tracker 'tensorboard' needs TensorBoard, which cannot be imported "
                f'({error}); install it with  pip install "aegpo[tensorboard]"  or take the tracker out'
            ) from error
        return TensorboardObserver(folder / "tensorboard")


class JsonlObserver:
    """Writes `metrics.jsonl`, `evaluations.jsonl`, `timing.jsonl` and `images/step-000000.png`: see `runs.records`.

    Everything but `timing.jsonl` is deterministic: an interrupted and resumed run has the same bytes as one without
    a break. Rows are on disk before the checkpoint of their step is written.
    """

    def __init__(self, folder: Path, say: Callable[[str], None] | None = None) -> None:
        """`say` gets a line for each image that is gone when a run goes on; default: `warnings.warn`."""
        self._say = say or warnings.warn
        self._metrics, self._evaluations, self._timing = (folder / name for name in (METRICS, EVALUATIONS, TIMING))
        self._images = folder / IMAGES
        self._files: dict[Path, RowFile] = {}  # once the run has begun

    @hookimpl
    def aegpo_on_run_start(self, run: RunInfo) -> None:
        """Checks what earlier starts recorded, and forgets what was recorded beyond the checkpoint."""
        go_on(run, self._say)
        self._files = {path: RowFile(path) for path in (self._metrics, self._evaluations, self._timing)}

    @hookimpl
    def aegpo_on_step_end(self, run: RunInfo, report: StepReport) -> None:
        """Adds the step's rows."""
        self._files[self._timing].append({"step": report.step, "seconds": dict(report.seconds)})
        self._files[self._metrics].append(_metrics_row(report))

    @hookimpl
    def aegpo_on_evaluation(self, run: RunInfo, step: int, evaluation: Evaluation) -> None:
        """Adds the evaluation's row, and its images."""
        image = grid_png(evaluation.images)
        write_atomically(self._images / image_name(step), image)
        self._files[self._timing].append({"step": step, "seconds": {"evaluation": evaluation.seconds}})
        seen = {"image_sha256": hashlib.sha256(image).hexdigest()}
        self._files[self._evaluations].append({"step": step, **_evaluation_row(evaluation), **seen})


def _metrics_row(report: StepReport) -> dict[str, Any]:
    return {
        "step": report.step,
        "metrics": {name: float(value) for name, value in report.metrics.items()},
        "prompts": [prompt.index for prompt in report.prompts],
        "counts": report.counts.tolist(),
        "selected": [np.flatnonzero(steps).tolist() for steps in report.selected],
        "signals": {name: _without_nan(signal.values.tolist()) for name, signal in report.signals.items()},
    }


def _without_nan(values: Any) -> Any:
    """A number, or a list of such, for JSON, which has no NaN: null at what is not known."""
    if isinstance(values, list):
        return [_without_nan(value) for value in values]
    return None if math.isnan(values) else values


def _evaluation_row(evaluation: Evaluation) -> dict[str, Any]:
    return {
        "scores": {label: scores.tolist() for label, scores in evaluation.scores.items()},
        "base_scores": {label: scores.tolist() for label, scores in evaluation.base_scores.items()},
        "prompts": list(evaluation.prompts),
    }


def grid_png(images: Tensor) -> bytes:
    """Images (k, [F,] 3, h, w) in [0, 1] as one PNG, side by side; small ones are enlarged with nearest neighbour.

    A video is a strip of some of its frames.
    """
    from PIL import Image

    gap, factor = _GAP if images.ndim == 4 else _WIDE_GAP, max(1, _TILE // max(images.shape[-2:]))
    enlarged = images.repeat_interleave(factor, dim=-2).repeat_interleave(factor, dim=-1)
    pixels = (side_by_side(enlarged).float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    count, height, width, _ = pixels.shape  # (k, h, w, 3)
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    row_step, column_step = height + gap, width + gap
    sheet = np.full((rows * row_step - gap, columns * column_step - gap, 3), 255, dtype=np.uint8)
    for index, image in enumerate(pixels):
        top, left = index // columns * row_step, index % columns * column_step
        sheet[top : top + height, left : left + width] = image
    file = io.BytesIO()
    Image.fromarray(sheet).save(file, format="PNG")
    return file.getvalue()


class ConsoleObserver:
    """Shows one run."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._display: Display | None = None
        self._standing: Standing | None = None

    @hookimpl
    def aegpo_on_run_start(self, run: RunInfo) -> None:
        """Takes the terminal and says where the run starts."""
        from aegpo.runs.progress import Record, display

        self._display = display(self._console, every_step=True)
        self._display.__enter__()
        self._standing = Record(run.folder, run.training_steps).read(until=run.first_step)
        self._display.show(_label(run), self._standing)

    @hookimpl
    def aegpo_on_step_end(self, run: RunInfo, report: StepReport) -> None:
        """Shows the step."""
        assert self._display is not None, "a run starts before it steps"
        assert self._standing is not None
        self._standing = self._standing.after_step(report.step, report.metrics)
        self._display.show(_label(run), self._standing)

    @hookimpl
    def aegpo_on_evaluation(self, run: RunInfo, step: int, evaluation: Evaluation) -> None:
        """Shows its mean scores."""
        assert self._display is not None, "a run starts before it evaluates"
        assert self._standing is not None
        means = {label: float(scores.mean()) for label, scores in evaluation.scores.items()}
        self._standing = self._standing.after_evaluation(step, means)
        self._display.show(_label(run), self._standing)

    @hookimpl
    def aegpo_on_run_end(self, run: RunInfo, outcome: Outcome) -> None:
        """Says how it ended and gives the terminal back."""
        if self._display is not None:
            self._display.end(_label(run), outcome)
            self._display.__exit__(None, None, None)
            self._display = None


def _label(run: RunInfo) -> str:
    return f"{run.arm} seed {run.seed}"


class TensorboardObserver:
    """Writes event files; what an earlier start wrote beyond the checkpoint is struck out."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: SummaryWriter | None = None

    @hookimpl
    def aegpo_on_run_start(self, run: RunInfo) -> None:
        """Opens a new event file."""
        from torch.utils.tensorboard import SummaryWriter

        purge = run.first_step + 1 if run.first_step > 0 else 0
        self._writer = SummaryWriter(log_dir=str(self._folder), purge_step=purge)

    @hookimpl
    def aegpo_on_step_end(self, run: RunInfo, report: StepReport) -> None:
        """Adds a point to every curve."""
        assert self._writer is not None, "a run starts before it steps"
        scalars = {**report.metrics, **{f"seconds/{stage}": value for stage, value in report.seconds.items()}}
        self._add(report.step, scalars)

    @hookimpl
    def aegpo_on_evaluation(self, run: RunInfo, step: int, evaluation: Evaluation) -> None:
        """Adds a point to the curves of mean scores, and the images."""
        assert self._writer is not None, "a run starts before it evaluates"
        scores = {f"evaluation/{label}": float(values.mean()) for label, values in evaluation.scores.items()}
        self._writer.add_images("evaluation", side_by_side(evaluation.images).clamp(0, 1), step)
        self._add(step, {**scores, "seconds/evaluation": evaluation.seconds})

    def _add(self, step: int, scalars: Mapping[str, float]) -> None:
        assert self._writer is not None
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    @hookimpl
    def aegpo_on_run_end(self, run: RunInfo, outcome: Outcome) -> None:
        """Closes the event file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
