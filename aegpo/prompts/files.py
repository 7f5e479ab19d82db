"""Files of prompts: what each kind of file says, line by line, or why it cannot be read and what would be right."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from aegpo.core import texts
from aegpo.core.records import Prompt
from aegpo.errors import SettingError
from aegpo.prompts import images
from aegpo.prompts.entries import KEY, Entry, entry, value_of
from aegpo.prompts.tables import columns_unread, parquet, separated

MOST_BYTES = 2**30  # of a file of prompts: millions of them


def read_file(path: Path) -> tuple[Prompt, ...]:
    """The prompts of a file, as `read_places`."""
    return tuple(read_places(path).values())


def read_places(path: Path) -> dict[str, Prompt]:
    """The prompts of a file by their place in it, read as what its name says it is.

    .txt, or no ending: one a line. .jsonl, .ndjson and .json: texts, or objects with the key `prompt`. .csv, .tsv and
    .parquet: rows with the column `prompt`. `image` and `images` name the prompt's images; the rest is its metadata.
    Only a newline ends a line.

    Raises:
        SettingError: if the file cannot be read or is no such file, a place in it holds no prompt, or it has none.
    """
    kind = path.suffix.lower()
    if kind not in _READERS:
        known = ", ".join(filter(None, _READERS))
        raise SettingError(f"{path}: {path.suffix} is no kind of file of prompts; known: {known}", "prompts")
    found = list(_READERS[kind](path, _content(path)))
    if not found:
        raise SettingError(f"{path} has no prompts; it should have {_EACH[kind]}", "prompts")
    return {each.where: _prompt(index, each, path.parent) for index, each in enumerate(found)}


def unread(path: Path) -> tuple[str, ...]:
    """The columns of a file that `read_places` reads but that become no metadata, since JSON lacks their values."""
    return columns_unread(path) if path.suffix.lower() == ".parquet" else ()


def _content(path: Path) -> bytes:
    """What is in a file, which is a file and not too large."""
    try:
        if path.is_dir():
            way = "name a file in it, or write it as a dataset: {dataset: FOLDER}"
            raise SettingError(f"cannot read {path}: it is a folder; {way}", "prompts")
        if path.exists() and not path.is_file():
            raise SettingError(f"cannot read {path}: it is no regular file; save the prompts to one", "prompts")
        if (size := path.stat().st_size) > MOST_BYTES:
            what = f"it has {size:,} bytes; a file of prompts has {MOST_BYTES:,} at most"
            raise SettingError(f"cannot read {path}: {what}", "prompts")
        return path.read_bytes()
    except OSError as error:
        raise SettingError(f"cannot read {path}: {error.strerror}", "prompts") from error
    except ValueError as error:  # of a name that no file can have
        raise SettingError(f"cannot read {str(path)!r}: {error}", "prompts") from error


def _text(path: Path, content: bytes) -> str:
    try:
        return texts.utf8(content)
    except texts.NotTextError as error:
        raise SettingError(f"{path}, line {error.line}: {error.message}", "prompts") from error


def _rows(path: Path, content: bytes) -> Iterator[tuple[str, str]]:
    """Lines that are not blank, with their places."""
    for number, line in enumerate(_text(path, content).split("\n"), start=1):
        where, line = f"{path}, line {number}", line.removesuffix("\r")
        if "\r" in line:
            what = "has a carriage return alone; only a newline ends a line, so save the file with newlines"
            raise SettingError(f"{where} {what}", "prompts")
        if line.strip():
            yield where, line


def _lines(path: Path, content: bytes) -> Iterator[Entry]:
    for number, (where, line) in enumerate(_rows(path, content)):
        if (kind := _kind_of_line(line, first=number == 0)) is not None:
            raise SettingError(f"{where} is one of a {kind} file, not a prompt; rename the file", "prompts")
        yield Entry(where, line.strip(), {})


def _kind_of_line(line: str, *, first: bool) -> str | None:
    """The other kind of file that a line surely comes from: it is an object with a prompt, or names columns."""
    if line.lstrip().startswith("{"):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            return None
        return ".jsonl" if KEY in value else None
    separators = {".csv": ",", ".tsv": "\t"}
    tables = (kind for kind, each in separators.items() if KEY in (cell.strip('"') for cell in line.split(each)))
    return next(tables, None) if first else None


def _json_lines(path: Path, content: bytes) -> Iterator[Entry]:
    for where, line in _rows(path, content):
        try:
            value = value_of(line)
        except ValueError as error:
            way = "; a list of all prompts is a .json file" if line.strip() in ("[", "{") else ""
            raise SettingError(f"{where} is not JSON: {_why(error)}{way}", "prompts") from error
        yield entry(where, value)


def _json_list(path: Path, content: bytes) -> Iterator[Entry]:
    try:
        values = value_of(_text(path, content))
    except ValueError as error:
        what = (
            f"line {error.lineno}, column {error.colno}: {error.msg}"
            if isinstance(error, json.JSONDecodeError)
            else error
        )
        way = "; one value a line is a .jsonl file" if str(error).startswith("Extra data") else ""
        raise SettingError(f"{path} is not JSON: {what}{way}", "prompts") from error
    if not isinstance(values, list):
        raise SettingError(f"{path} holds a {type(values).__name__}; a list of prompts was expected", "prompts")
    yield from (entry(f"{path}, item {index}", value) for index, value in enumerate(values))


def _why(error: ValueError) -> str:
    """What is wrong with one line."""
    return f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)


def _commas(path: Path, content: bytes) -> Iterator[Entry]:
    return separated(path, _text(path, content), ",")


def _tabs(path: Path, content: bytes) -> Iterator[Entry]:
    return separated(path, _text(path, content), "\t")


_READERS: Mapping[str, Callable[[Path, bytes], Iterator[Entry]]] = {
    "": _lines,
    ".txt": _lines,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_list,
    ".csv": _commas,
    ".tsv": _tabs,
    ".parquet": parquet,
}
_EACH: Mapping[str, str] = {
    **dict.fromkeys(_READERS, "one a line"),
    ".json": "a list of them",
    **dict.fromkeys((".csv", ".tsv", ".parquet"), "one a row"),
}


def _prompt(index: int, found: Entry, folder: Path) -> Prompt:
    """A prompt from what its line has beside the text: the images that it names, and metadata."""
    named = images.named_images(found.where, found.beside, folder)
    images.refuse_others(found.where, named)
    metadata: dict[str, Any] = {key: value for key, value in found.beside.items() if key not in images.KEYS}
    return Prompt(index, found.text, metadata, named)
