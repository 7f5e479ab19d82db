"""The records of a run, which notice that they were changed: every row and every document ends in a checksum.

    {"step": 1, "metrics": {...}, ..., "crc32": "9ae0daaf"}     a row: CRC-32 of the file up to the comma before its key
    {... "crc32": "1c291ca3"}                                   a document: the same

A row's checksum is of all that is before it in its file, so it also notices rows that are missing, doubled or of
another file. Rows and documents of versions that wrote no checksum are read; the first row with one counts them in.
They may have no key that is not known, so that a damaged checksum is not mistaken for none.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from aegpo.core.as_json import dumps, loads
from aegpo.core.files import append, write_atomically
from aegpo.errors import CheckpointError

KEY = "crc32"
_ROW = re.compile(rb'(.*), "crc32": "([0-9a-f]{8})"\}\n', re.DOTALL)
_DOCUMENT = re.compile(rb'(.*),\n "crc32": "([0-9a-f]{8})"\n\}\n', re.DOTALL)

# --- rows ------------------------------------------------------------------------------------------------------------


class Row(BaseModel):
    """The keys that a row of a file may have."""

    model_config = ConfigDict(extra="forbid", strict=True)

    step: int
    crc32: str = ""  # before 0.2 there was none


class MetricsRow(Row):
    """A training step, in metrics.jsonl."""

    metrics: dict[str, float]
    prompts: list[int | str]
    counts: list[int]
    selected: list[list[int]]
    signals: dict[str, list[float | None] | list[list[float | None]]] = {}
    entropy: list[list[float | None]] | None = None  # what 0.1 called its signals
    delta: list[float | None] | None = None

    @model_validator(mode="after")
    def _is_of_some_prompts(self) -> MetricsRow:
        if not len(self.prompts) == len(self.counts) == len(self.selected):
            raise ValueError("prompts, counts and selected are not as many")
        for table in (*self.signals.values(), self.entropy or []):
            if len({len(row) if isinstance(row, list) else -1 for row in table}) > 1:
                raise ValueError("a signal is neither a list nor a table with rows of one length")
        return self


class EvaluationRow(Row):
    """Scores of the held-out prompts, in evaluations.jsonl."""

    scores: dict[str, list[float]]
    base_scores: dict[str, list[float]]
    prompts: list[str]
    image_sha256: str = ""  # of images/step-000000.png; before 0.2 there was none

    @model_validator(mode="after")
    def _scores_every_prompt(self) -> EvaluationRow:
        if self.scores.keys() != self.base_scores.keys():
            raise ValueError("scores and base_scores are not of the same rewards")
        if any(len(each) != len(self.prompts) for each in (*self.scores.values(), *self.base_scores.values())):
            raise ValueError("scores and prompts are not as many")
        return self


class TimingRow(Row):
    """Wall-clock by stage, in timing.jsonl: of a step, of its evaluation, or of both."""

    seconds: dict[str, float]


class DroppedRow(Row):
    """An observer that was left out, in dropped.jsonl."""

    event: str
    observer: str
    error: str


@dataclass(frozen=True)
class Damage:
    """Where the rows of a file end, if it goes on."""

    line: int  # from 1
    why: str
    step: int | None = None  # what the line says, if it is a row but for its checksum

    def __str__(self) -> str:
        """``line 3 was changed, ...``."""
        return f"line {self.line} {self.why}"


@dataclass(frozen=True)
class Rows:
    """The rows of a file, up to the first that is damaged or only half written."""

    path: Path
    rows: tuple[Mapping[str, Any], ...]
    ends: tuple[int, ...]  # of each row, in bytes from the start of the file
    damage: Damage | None

    def whole(self) -> tuple[Mapping[str, Any], ...]:
        """All rows; a last line without its newline is one that was being written, and left out.

        Raises:
            CheckpointError: if a row is damaged.
        """
        if self.damage is not None and self.damage.why != _HALF:
            raise CheckpointError(f"cannot read {self.path}: {self.damage}; put the file back")
        return self.rows


_HALF = "is cut short"


def read_rows(path: Path, kind: type[Row]) -> Rows:
    """The rows of a file; none if there is no file.

    Raises:
        CheckpointError: if it cannot be read.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        content = b""
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}; put the file back") from error
    rows, ends, checksum = list[Mapping[str, Any]](), list[int](), 0
    for number, line in enumerate(_lines(content), start=1):
        row = parse_row(line, kind)
        damage = row if isinstance(row, str) else _changed(line, KEY in row, checksum)
        if damage is not None:
            step = None if isinstance(row, str) else row["step"]
            return Rows(path, tuple(rows), tuple(ends), Damage(number, damage, step))
        assert not isinstance(row, str)
        rows.append(row)
        ends.append((ends[-1] if ends else 0) + len(line))
        checksum = zlib.crc32(line, checksum)
    return Rows(path, tuple(rows), tuple(ends), None)


def parse_row(line: bytes, kind: type[Row]) -> Mapping[str, Any] | str:
    """A row with its newline, or why it is none. Its checksum is only looked for: that depends on what is before it."""
    if not line.endswith(b"\n"):
        return _HALF if line.startswith(b"{") else "is no row"
    try:
        row = loads(line)
        kind.model_validate(row)
    except ValidationError as error:
        first = error.errors()[0]
        return f"is not such a row: {'.'.join(map(str, first['loc'])) or 'it'}: {first['msg'].lower()}"
    except ValueError as error:
        return f"is not JSON: {error}"
    return dict(row)


class RowFile:
    """A file that rows are added to."""

    def __init__(self, path: Path) -> None:
        """What is there stays and is counted in; it ends with a whole row."""
        self._path = path
        self._checksum = zlib.crc32(path.read_bytes()) if path.exists() else 0

    def append(self, row: Mapping[str, Any]) -> None:
        """Adds a row; it is on disk when this returns."""
        text = dumps(row).encode().removesuffix(b"}")
        line = b'%s, "%s": "%08x"}\n' % (text, KEY.encode(), zlib.crc32(text, self._checksum))
        append(self._path, line)
        self._checksum = zlib.crc32(line, self._checksum)


def _lines(content: bytes) -> list[bytes]:
    """Lines with their newline, and nothing else ends one."""
    *lines, rest = content.split(b"\n")
    return [line + b"\n" for line in lines] + ([rest] if rest else [])


def _changed(line: bytes, signed: bool, checksum: int) -> str | None:
    """Why a line does not have the checksum of what is up to there; None: it has, or is of an older version."""
    if not signed:
        return None
    found = _ROW.fullmatch(line)
    if found is not None and int(found[2], 16) == zlib.crc32(found[1], checksum):
        return None
    return f"was changed, or what is before it was, or is missing or there twice: its {KEY} is wrong"


# --- documents -------------------------------------------------------------------------------------------------------


def write_document(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON object with its checksum, so that the file is whole or absent at any moment."""
    text = dumps(value, indent=1).encode().removesuffix(b"\n}")
    write_atomically(path, b'%s,\n "%s": "%08x"\n}\n' % (text, KEY.encode(), zlib.crc32(text)))


def read_document(path: Path, keys: Collection[str], way_out: str) -> dict[str, Any]:
    """A JSON object, without its checksum.

    Args:
        path: of the file.
        keys: that it may have; one without a checksum is of an older version.
        way_out: what to do about one that is damaged.

    Raises:
        CheckpointError: if it is missing, damaged, or has other keys.
    """
    try:
        content = path.read_bytes()
        value = loads(content)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}; {way_out}") from error
    except ValueError as error:
        raise CheckpointError(f"cannot read {path}: it is not JSON: {error}; {way_out}") from error
    found = _DOCUMENT.fullmatch(content)
    if not isinstance(value, dict) or not value.keys() <= {*keys, KEY}:
        odd = sorted(value.keys() - {*keys, KEY}) if isinstance(value, dict) else []
        why = f"the key {odd[0]!r} is none of its keys" if odd else "it is no object"
        raise CheckpointError(f"cannot read {path}: {why}; it is damaged, or of a newer version; {way_out}")
    if KEY in value and (found is None or int(found[2], 16) != zlib.crc32(found[1])):
        raise CheckpointError(
            f"cannot read {path}: it was changed since it was written, its {KEY} is wrong; {way_out} (whoever changed "
            f"it on purpose takes the key {KEY} out)"
        )
    return {key: each for key, each in value.items() if key != KEY}
