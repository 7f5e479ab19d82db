"""What the record of a run must have when it goes on, and what of it is forgotten: that which will be done again.

Nothing is changed before all of it is checked. What a checkpoint counts must be there, whole; what is beyond, a row
that a crash left half written included, is cut off.
"""

from __future__ import annotations

import hashlib
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aegpo.core.files import write_atomically
from aegpo.core.reports import RunInfo
from aegpo.errors import CheckpointError
from aegpo.runs.evaluations import unevaluated
from aegpo.runs.longer import ended_here
from aegpo.runs.records import EvaluationRow, MetricsRow, Row, Rows, TimingRow, read_rows

if TYPE_CHECKING:
    from aegpo.runs.checkpoints import Checkpoint

METRICS, EVALUATIONS, TIMING = "metrics.jsonl", "evaluations.jsonl", "timing.jsonl"
IMAGES = "images"
_IMAGE = re.compile(r"step-(\d{6,})\.png")
_PUT_BACK = "put the file back, or start the run over with --fresh"


def image_name(step: int) -> str:
    """The file of an evaluation's images."""
    return f"step-{step:06d}.png"


def image_steps(folder: Path) -> Iterator[tuple[int, Path]]:
    """The images of evaluations in a folder, and nothing else that is there."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        match = _IMAGE.fullmatch(path.name)
        if match is not None and path.is_file():
            yield int(match[1]), path


# --- what a checkpoint says of the record ----------------------------------------------------------------------------


def counted(folder: Path) -> dict[str, list[int]]:
    """How long the records are now, in bytes, and their CRC-32: what a checkpoint says of them."""
    contents = {name: folder / name for name in (METRICS, EVALUATIONS)}
    read = {name: path.read_bytes() for name, path in contents.items() if path.exists()}
    return {name: [len(content), zlib.crc32(content)] for name, content in read.items()}


def miscounted(folder: Path, said: Mapping[str, Any]) -> Iterator[Path]:
    """The records that do not begin as a checkpoint says of them; earlier versions said nothing.

    Raises:
        CheckpointError: if one cannot be read.
    """
    for name, (size, checksum) in said.items():
        path = folder / name
        try:
            with path.open("rb") as file:
                content = file.read(size)
        except FileNotFoundError:
            content = b""
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}; {_PUT_BACK}") from error
        if (len(content), zlib.crc32(content)) != (size, checksum):
            yield path


def check_counted(folder: Path, checkpoint: Checkpoint | None) -> None:
    """Refuses records that do not begin as the checkpoint says, such as those of another run.

    Raises:
        CheckpointError: if there is one; the message says what is found at its first odd row, if that is odd.
    """
    if checkpoint is None or checkpoint.records is None:
        return
    kinds: dict[str, type[Row]] = {METRICS: MetricsRow, EVALUATIONS: EvaluationRow}
    for path in miscounted(folder, checkpoint.records):
        because = _because(read_rows(path, kinds[path.name]))
        raise CheckpointError(
            f"{path} is not what the checkpoint of step {checkpoint.step} counts{because}: it was changed, cut short "
            f"or is of another run; {_PUT_BACK}"
        )


# --- what an earlier start left --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kept:
    """What stays of a file of rows."""

    path: Path
    rows: tuple[Mapping[str, Any], ...]
    size: int  # bytes

    def cut(self) -> None:
        """Cuts the rest off."""
        if self.path.exists() and self.path.stat().st_size > self.size:
            write_atomically(self.path, self.path.read_bytes()[: self.size])


def go_on(run: RunInfo, say: Callable[[str], None]) -> None:
    """Checks what earlier starts recorded of a run, and forgets what it will do again.

    Without a checkpoint a run starts at step 0, which records its evaluation again: then nothing is kept.

    Args:
        run: which starts, or goes on.
        say: gets a line for each image that is gone.

    Raises:
        CheckpointError: if what the checkpoint counts is damaged or missing; then nothing is changed.
    """
    images = run.folder / IMAGES
    if images.exists() and not images.is_dir():
        raise CheckpointError(f"{images} is a file where a folder goes; move it, then give the same command again")
    done = run.first_step - 1 if run.owes_evaluation else run.first_step
    if run.first_step == 0:
        kept = [Kept(run.folder / name, (), 0) for name in (METRICS, EVALUATIONS, TIMING)]
        done = -1
    else:
        kept = [_metrics(run), _evaluations(run, done), _timing(run, done)]
        lost = list(_lost_images(kept[1].rows, images))
        for line in lost:
            say(line)
    for each in kept:
        each.cut()
    images.mkdir(parents=True, exist_ok=True)
    for step, path in image_steps(images):
        if step > done or _is_of_the_ending(run, step):
            path.unlink()


def _is_of_the_ending(run: RunInfo, step: int) -> bool:
    """True for the evaluation where the run was to end before it got more steps."""
    return step == run.first_step and ended_here(run)


def _metrics(run: RunInfo) -> Kept:
    read = read_rows(run.folder / METRICS, MetricsRow)
    kept = _until(read, lambda row: row["step"] <= run.first_step)
    if [row["step"] for row in kept.rows] != list(range(1, run.first_step + 1)):
        raise CheckpointError(
            f"the checkpoint was written after step {run.first_step}, but {read.path} holds {len(kept.rows)} of the "
            f"{run.first_step} rows before it{_because(read)}; {_PUT_BACK}"
        )
    _refuse_twice(read, kept, run.first_step)
    return kept


def _evaluations(run: RunInfo, done: int) -> Kept:
    read = read_rows(run.folder / EVALUATIONS, EvaluationRow)
    kept = _until(read, lambda row: row["step"] <= done and not _is_of_the_ending(run, row["step"]))
    steps = [row["step"] for row in kept.rows]
    lost = unevaluated(steps, run.evaluated_steps, done)
    if lost:
        raise CheckpointError(
            f"the checkpoint was written after step {run.first_step}, but {read.path} lacks {lost}{_because(read)}; "
            f"{_PUT_BACK}"
        )
    if steps != sorted(set(steps)):
        raise CheckpointError(f"{read.path} has steps twice or in another order: {steps}; {_PUT_BACK}")
    _refuse_twice(read, kept, done)
    return kept


def _timing(run: RunInfo, done: int) -> Kept:
    """Wall-clock is no number of a run: it may be lost, but not be wrong."""
    read = read_rows(run.folder / TIMING, TimingRow)

    def before(row: Mapping[str, Any]) -> bool:
        if row["seconds"].keys() == {"evaluation"}:
            return bool(row["step"] <= done) and not _is_of_the_ending(run, row["step"])
        return bool(row["step"] <= max(done, run.first_step))

    kept = _until(read, before)
    stepped = [row["step"] for row in kept.rows if row["seconds"].keys() != {"evaluation"}]
    if read.path.exists() and stepped != list(range(stepped[0] if stepped else 1, run.first_step + 1)):
        raise CheckpointError(
            f"the checkpoint was written after step {run.first_step}, but {read.path} does not hold the seconds of the "
            f"steps before it{_because(read)}; put the file back, or delete it to go on without them"
        )
    _refuse_twice(read, kept, run.first_step)
    return kept


def _until(read: Rows, before: Callable[[Mapping[str, Any]], bool]) -> Kept:
    """The rows up to the first that will be written again."""
    rows = tuple(takewhile(before, read.rows))
    return Kept(read.path, rows, read.ends[len(rows) - 1] if rows else 0)


def _because(read: Rows) -> str:
    return "" if read.damage is None else f" ({read.damage})"


def _refuse_twice(read: Rows, kept: Kept, until: int) -> None:
    """Refuses what follows the rows if it is one of them again; what a crash left half written is none."""
    damage = read.damage
    if damage is not None and len(kept.rows) == len(read.rows) and damage.step is not None and damage.step <= until:
        raise CheckpointError(f"{read.path} goes on after step {until} with step {damage.step}: {damage}; {_PUT_BACK}")


def _lost_images(rows: tuple[Mapping[str, Any], ...], images: Path) -> Iterator[str]:
    """A line for each image that is gone.

    Raises:
        CheckpointError: if one is damaged, or all are gone with their folder.
    """
    expected = {row["step"]: row["image_sha256"] for row in rows if "image_sha256" in row}
    if expected and not images.is_dir():
        raise CheckpointError(
            f"{images} is gone, with {len(expected)} images that {EVALUATIONS} counts; put it back, or make an empty "
            "folder to go on without them"
        )
    for step, wrong in damaged_images(expected, images):
        path = images / image_name(step)
        if path.exists():
            raise CheckpointError(f"{path} {wrong}; put it back, or delete it to go on without it")
        yield f"{path} {wrong}; the run goes on without it"


def damaged_images(expected: Mapping[int, str], images: Path) -> Iterator[tuple[int, str]]:
    """The steps whose images are not as their evaluation says by SHA-256, and what is wrong with each."""
    for step, checksum in expected.items():
        path = images / image_name(step)
        try:
            if hashlib.sha256(path.read_bytes()).hexdigest() != checksum:
                yield step, "was changed since it was written"
        except FileNotFoundError:
            yield step, "is gone"
        except OSError as error:
            yield step, f"cannot be read: {error.strerror}"
