"""Datasets of prompts, of the hub or in a folder, through the package `datasets`."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from aegpo.core.records import Prompt
from aegpo.core.sections import DatasetPrompts
from aegpo.errors import SettingError
from aegpo.prompts import images
from aegpo.prompts.entries import Listed, columns_left_out, short
from aegpo.prompts.hub import refusal
from aegpo.prompts.tables import plain_columns

Asked = tuple[str, tuple[Path, ...]]  # of `Prompt.asked`


def read_dataset(source: DatasetPrompts, without: Collection[Asked] = (), count: int | None = None) -> Listed:
    """The prompts of a dataset, each once, in its order, where it comes first; the first `count` not among `without`.

    In a folder, the texts of columns `image` and `images` are paths of the prompt's images. Other columns are its
    metadata, those that JSON has: no images, sounds, dates or bytes. Rows that repeat a prompt or have none, null or
    blank, are left out and counted.

    Raises:
        SettingError: if `datasets` is not installed, the dataset cannot be had, or has no such split or column; if a
            prompt is no text, or an image is missing.
    """
    rows = _loaded(source)
    plain, texts = plain_columns(rows.features.arrow_schema), _texts(rows[source.column], source)
    shown = [] if _folder(source) is None else [name for name in plain if name in images.KEYS]
    named = _named(rows, source, shown)
    first = {asked: row for row, asked in reversed(list(enumerate(zip(texts, named, strict=True)))) if asked[0]}
    if not first:
        raise SettingError(f"column {source.column!r} of {source.label} is empty", "prompts")
    free = sorted(row for asked, row in first.items() if asked not in without)
    kept = free[:count]
    others = [name for name in plain if name not in (source.column, *shown)]
    metadata = rows.select_columns(others).select(kept).to_list() if others else [{}] * len(kept)
    for row in kept:
        images.refuse_others(_row(source, row), named[row])
    found = zip(kept, metadata, strict=True)
    prompts = tuple(Prompt(index, texts[row], beside, named[row]) for index, (row, beside) in enumerate(found))
    unused = _unused(source, texts, len(first), len(free), len(kept))
    odd = [name for name in rows.column_names if name not in (source.column, *plain)]
    return Listed(prompts, (*unused, *([f"{source.label}: {columns_left_out(odd)}"] if odd else [])))


def _texts(values: Sequence[object], source: DatasetPrompts) -> list[str]:
    """The texts of a column without what is around them; nothing where it is null."""
    for row, value in enumerate(values):
        if value is not None and not isinstance(value, str):
            what = f"has {short(value)} in column {source.column!r}; a text was expected, so name a column of texts"
            raise SettingError(f"{_row(source, row)} {what}", "prompts")
    return [value.strip() if isinstance(value, str) else "" for value in values]


def _unused(source: DatasetPrompts, texts: Sequence[str], different: int, free: int, kept: int) -> Iterator[str]:
    """What of a dataset is left out."""
    empty = texts.count("")
    if empty:
        yield f"{source.label}: {empty:,} of {len(texts):,} rows have no prompt and are left out"
    if repeated := len(texts) - empty - different:
        yield f"{source.label}: {repeated:,} of {len(texts):,} rows repeat a prompt and are left out"
    if different > free:
        yield f"{source.label}: {different - free:,} of {different:,} prompts are held out and are not trained on"
    if free > kept:
        yield f"{source.label}: the first {kept:,} of {free:,} prompts are used"


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


def _refused(source: DatasetPrompts) -> str | None:
    """Why the hub does not give a dataset: asked again, since `datasets` throws the hub's own answer away."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        HfApi().dataset_info(source.dataset, revision=source.revision)
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError, ValueError) as error:
        return refusal(error, source.dataset, source.revision, dataset=True)
    return None
