"""Tables of prompts: files of comma- or tab-separated values, and Parquet; which columns JSON could hold."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

from aegpo.errors import SettingError
from aegpo.prompts.entries import KEY, Entry, lacking_column, short

_SAID = {",": "commas", "\t": "tabs"}
_LONGEST = 131_072  # characters of a cell, as the module csv has it
_MOST_ROWS = 10_000_000  # of a Parquet file, which may say one value as often as it likes


def separated(path: Path, text: str, separator: str) -> Iterator[Entry]:
    """Rows below a first line of names; every value is text, and an empty cell is null.

    Raises:
        SettingError: if there is no column of prompts, or a row is none; the message has the line.
    """
    rows = _rows(path, text, separator)
    where, names = next(rows, (f"{path}", []))
    if KEY not in names:
        raise lacking_column(f"{where}, which names the columns between {_SAID[separator]},", names)
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise SettingError(f"{where} names the column {twice[0]!r} twice; rename one", "prompts")
    for where, cells in rows:
        if len(cells) != len(names):
            what = f"has {len(cells)} values for {len(names)} columns; write a value with a separator in double quotes"
            raise SettingError(f"{where} {what}", "prompts")
        row = {name: cell or None for name, cell in zip(names, cells, strict=True)}
        yield _entry(where, row.pop(KEY), row)


def parquet(path: Path, content: bytes) -> Iterator[Entry]:
    """Rows of a Parquet file, with the columns whose values JSON has.

    Raises:
        SettingError: if it cannot be read, or has no column of prompts; the message has the row, counted from 0.
    """
    try:
        import pyarrow
        from pyarrow.parquet import read_metadata, read_table
    except ImportError as error:
        raise SettingError(
            f"{path} is a Parquet file, which the package pyarrow reads, which cannot be imported ({error}); install "
            'it with  pip install "aegpo[datasets]"  or save the prompts as .jsonl',
            "prompts",
        ) from error
    try:
        rows = read_metadata(BytesIO(content)).num_rows
        if rows > _MOST_ROWS:
            raise ValueError(f"it has {rows:,} rows, more than {_MOST_ROWS:,}")
        table = read_table(BytesIO(content))
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise SettingError(f"{path} is no Parquet file that can be read: {reason}; write it anew", "prompts") from error
    if KEY not in table.column_names:
        raise lacking_column(str(path), table.column_names)
    twice = sorted({name for name in table.column_names if table.column_names.count(name) > 1})
    if twice:
        raise SettingError(f"{path} has the column {twice[0]!r} twice; rename one", "prompts")
    schema = table.schema
    kept = [name for name in plain_columns(schema) if name != KEY]
    for number, row in enumerate(table.select([KEY, *kept]).to_pylist()):
        yield _entry(f"{path}, row {number}", row.pop(KEY), row)


def columns_unread(path: Path) -> tuple[str, ...]:
    """The columns of a Parquet file, which can be read, whose values are not JSON's."""
    from pyarrow.parquet import read_schema

    schema = read_schema(path)
    return tuple(name for name in schema.names if name not in plain_columns(schema) and name != KEY)


def plain_columns(schema: Any) -> list[str]:
    """The columns of an Arrow schema whose values are JSON's: texts, numbers, truth values, lists and mappings."""
    return [field.name for field in schema if _is_plain(field.type)]


def _is_plain(kind: Any) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        return _is_plain(kind.value_type)
    if types.is_struct(kind):
        return all(_is_plain(kind.field(place).type) for place in range(kind.num_fields))
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _is_plain(kind.value_type)
    checks = (types.is_string, types.is_large_string, types.is_integer, types.is_floating, types.is_boolean)
    return any(check(kind) for check in (*checks, types.is_null))


def _rows(path: Path, text: str, separator: str) -> Iterator[tuple[str, list[str]]]:
    """Rows that are not blank, each with the line it begins in."""
    reader = csv.reader((f"{line}\n" for line in text.split("\n")), delimiter=separator, strict=True)
    while True:
        where = f"{path}, line {reader.line_num + 1}"
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise SettingError(f"{where} is no row of separated values: {_why(error)}", "prompts") from error
        if row is None:
            return
        if any(cell.strip() for cell in row):
            yield where, row


def _why(error: csv.Error) -> str:
    """What the module csv found, in the words of a file."""
    found = str(error)
    if found.startswith("new-line"):
        return "it has a carriage return alone; only a newline ends a line"
    if found.startswith("field larger"):
        return f"a value has more than {_LONGEST:,} characters; is a double quote left open?"
    if found.startswith("unexpected end"):
        return "a double quote is left open; close it, or double it if it is part of the text"
    return f"{found}; double a double quote that is part of the text, in a value in double quotes"


def _entry(where: str, text: object, beside: dict[str, Any]) -> Entry:
    if isinstance(text, str) and text.strip():
        return Entry(where, text.strip(), beside)
    known = "has no prompt" if text is None or text == "" else f"has {short(text)} as {KEY!r}"
    raise SettingError(f"{where} {known}; a text was expected: fill it in, or remove the row", "prompts")
