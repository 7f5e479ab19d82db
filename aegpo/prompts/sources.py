"""Reads prompts: text and JSON files, and datasets."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from aegpo.core.records import Prompt
from aegpo.core.sections import DatasetPrompts
from aegpo.errors import SettingError
from aegpo.prompts import images
from aegpo.prompts.hub import refusal

KEY = "prompt"  # of the text in .json and .jsonl
Asked = tuple[str, tuple[Path, ...]]  # of `Prompt.asked`


def read_file(path: Path) -> tuple[Prompt, ...]:
    """The prompts of a file, as `read_places`."""
    return tuple(read_places(path).values())


def read_places(path: Path) -> dict[str, Prompt]:
    """The prompts of a file by their place in it: .jsonl and .json by the key `prompt`, everything else one a line.

    The keys `image` and `images` of an object name the prompt's images; other keys are its metadata.

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
    return {entry[0]: _prompt(index, *entry, path.parent) for index, entry in enumerate(found)}


def read_dataset(
    source: DatasetPrompts, without: Collection[Asked] = (), count: int | None = None
) -> tuple[Prompt, ...]:
    """The prompts of a dataset, each once, in its order, where it comes first; the first `count` not among `without`.

    In a folder, the texts of columns `image` and `images` are paths of the prompt's images. Other columns are its
    metadata, those that JSON has: no images, sounds, dates or bytes.

    Raises:
        SettingError: if `datasets` is not installed, the dataset cannot be had, or has no such split or column; or an
            image is missing.
    """
    rows = _loaded(source)
    plain, texts = _plain_columns(rows), [str(text).strip() for text in rows[source.column]]
    shown = [] if _folder(source) is None else [name for name in plain if name in images.KEYS]
    named = _named(rows, source, shown)
    first = {asked: row for row, asked in reversed(list(enumerate(zip(texts, named, strict=True)))) if asked[0]}
    if not first:
        raise SettingError(f"column {source.column!r} of {source.label} is empty", "prompts")
    kept = sorted(row for asked, row in first.items() if asked not in without)[:count]
    others = [name for name in plain if name not in (source.column, *shown)]
    metadata = rows.select_columns(others).select(kept).to_list() if others else [{}] * len(kept)
    for row in kept:
        images.refuse_others(_row(source, row), named[row])
    found = zip(kept, metadata, strict=True)
    return tuple(Prompt(index, texts[row], beside, named[row]) for index, (row, beside) in enumerate(found))


def _named(rows: Any, source: DatasetPrompts, columns: Sequence[str]) -> list[tuple[Path, ...]]:
    """The images that each row names in the given columns."""
    folder = _folder(source)
    if folder is None or not columns:
        return [()] * len(rows)
    beside = rows.select_columns(columns).to_list()
    return [images.named_images(_row(source, row), each, folder) for row, each in enumerate(beside)]


def _row(source: DatasetPrompts, row: int) -> str:
    return f"{source.label}, row {row}"


def _folder(source: DatasetPrompts) -> Path | None:
    """Where paths in a dataset are relative to: what lies beside its file, or in its folder; None on the hub."""
    folder = Path(source.dataset).expanduser()
    if not folder.is_dir():
        return None
    return folder if source.file is None else (folder / source.file).parent


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


_Entry = tuple[str, str, dict[str, Any]]  # place, text, and what else its line has


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


def _prompt(index: int, where: str, text: str, beside: Mapping[str, Any], folder: Path) -> Prompt:
    """A prompt from what its line has beside the text: the images that it names, and metadata."""
    named = images.named_images(where, beside, folder)
    images.refuse_others(where, named)
    metadata = {key: value for key, value in beside.items() if key not in images.KEYS}
    return Prompt(index, text, metadata, named)


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
