"""Reads prompts: text and JSON files, and datasets."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from aegpo.core.records import Prompt
from aegpo.core.sections import DatasetPrompts
from aegpo.errors import SettingError
from aegpo.prompts.hub import refusal

KEY = "prompt"  # of the text in .json and .jsonl


def read_file(path: Path) -> tuple[Prompt, ...]:
    """The prompts of a file, as `read_places`."""
    return tuple(read_places(path).values())


def read_places(path: Path) -> dict[str, Prompt]:
    """The prompts of a file by their place in it: .jsonl and .json by the key `prompt`, everything else one a line.

    Other keys of an object are the prompt's metadata.

    Raises:
        SettingError: if the file is missing or is not such a file, or has no prompts.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise SettingError(f"cannot read {path}: {error.strerror}", "prompts") from error
    except UnicodeDecodeError as error:
        raise SettingError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8", "prompts") from error
    found = list(_READERS.get(path.suffix.lower(), _lines)(path, text))
    if not found:
        raise SettingError(f"{path} has no prompts; it should have one a line", "prompts")
    return {where: Prompt(index, words, metadata) for index, (where, words, metadata) in enumerate(found)}


def read_dataset(source: DatasetPrompts, without: Collection[str] = (), count: int | None = None) -> tuple[Prompt, ...]:
    """The prompts of a dataset, each once, in its order, where it comes first; the first `count` not among `without`.

    Other columns are the prompt's metadata, those that JSON has: no images, sounds, dates or bytes.

    Raises:
        SettingError: if `datasets` is not installed, the dataset cannot be had, or has no such split or column.
    """
    rows = _loaded(source)
    texts = [str(text).strip() for text in rows[source.column]]
    first = {text: row for row, text in reversed(list(enumerate(texts))) if text}
    if not first:
        raise SettingError(f"column {source.column!r} of {source.label} is empty", "prompts")
    kept = sorted(row for text, row in first.items() if text not in without)[:count]
    others = [name for name in _plain_columns(rows) if name != source.column]
    metadata = rows.select_columns(others).select(kept).to_list() if others else [{}] * len(kept)
    return tuple(
        Prompt(index, texts[row], beside) for index, (row, beside) in enumerate(zip(kept, metadata, strict=True))
    )


def _loaded(source: DatasetPrompts) -> Any:
    """A dataset that has the column."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise SettingError(
            f"{source.label} needs the package datasets, which cannot be imported ({error}); install it with  "
            'pip install "aegpo[datasets]"',
            "prompts",
        ) from error
    where = Path(source.dataset).expanduser()
    name = str(where) if where.is_dir() else source.dataset
    try:
        rows = load_dataset(name, data_files=source.file, split=source.split, revision=source.revision)
    except Exception as error:  # datasets, the hub and their files fail in many ways; all of them are the source's
        told = None if where.is_dir() else _refused(source)
        reason = f"it {told}" if told else next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise SettingError(
            f"{source.label} cannot be loaded: {reason}; with a network, 'hf download {source.dataset} "
            "--repo-type dataset' gets it once, or give a file of prompts instead",
            "prompts",
        ) from error
    if source.column not in rows.column_names:
        known = ", ".join(rows.column_names)
        raise SettingError(f"{source.label} has no column {source.column!r}; it has {known}", "prompts")
    return rows


_Entry = tuple[str, str, dict[str, Any]]  # place, text, metadata


def _plain_columns(rows: Any) -> list[str]:
    """The columns whose values are JSON's: texts, numbers, truth values, and lists and mappings of them."""
    return [field.name for field in rows.features.arrow_schema if _is_plain(field.type)]


def _is_plain(kind: Any) -> bool:
    from pyarrow import types

    if types.is_struct(kind):
        return all(_is_plain(kind.field(place).type) for place in range(kind.num_fields))
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _is_plain(kind.value_type)
    checks = (types.is_string, types.is_large_string, types.is_integer, types.is_floating, types.is_boolean)
    return any(check(kind) for check in (*checks, types.is_null))


def _refused(source: DatasetPrompts) -> str | None:
    """Why the hub does not give a dataset: asked again, since `datasets` throws the hub's own answer away."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        HfApi().dataset_info(source.dataset, revision=source.revision)
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError, ValueError) as error:
        return refusal(error, source.dataset, source.revision, dataset=True)
    return None


def _lines(path: Path, text: str) -> Iterator[_Entry]:
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            yield f"{path}, line {number}", line.strip(), {}


def _json_lines(path: Path, text: str) -> Iterator[_Entry]:
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            try:
                value = json.loads(line)
            except ValueError as error:
                raise SettingError(f"{path}, line {number} is not JSON: {error}", "prompts") from error
            yield _entry(f"{path}, line {number}", value)


def _json_list(path: Path, text: str) -> Iterator[_Entry]:
    try:
        values = json.loads(text)
    except ValueError as error:
        raise SettingError(f"{path} is not JSON: {error}", "prompts") from error
    if not isinstance(values, list):
        raise SettingError(f"{path} holds a {type(values).__name__}; a list of prompts was expected", "prompts")
    yield from (_entry(f"{path}, item {index}", value) for index, value in enumerate(values))


_READERS = {".jsonl": _json_lines, ".json": _json_list}


def _entry(where: str, value: object) -> _Entry:
    """A text, or an object with a text under `prompt`."""
    if isinstance(value, str) and value.strip():
        return where, value.strip(), {}
    if isinstance(value, Mapping) and isinstance(value.get(KEY), str) and value[KEY].strip():
        return where, value[KEY].strip(), {str(key): other for key, other in value.items() if key != KEY}
    known = f"has the keys {', '.join(_names(value))}" if isinstance(value, Mapping) else f"is {json.dumps(value)}"
    raise SettingError(f"{where} {known}; a text, or an object with a text under {KEY!r}, was expected", "prompts")


def _names(value: Iterable[object]) -> list[str]:
    return [str(key) for key in value] or ["(none)"]
