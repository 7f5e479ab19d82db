"""What a place of a file of prompts says, and strict JSON: the same for lines, items and rows of tables."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from aegpo.core.records import Prompt
from aegpo.errors import SettingError

KEY = "prompt"  # of the text in objects, and the name of its column
DEEPEST = 32  # lists and mappings inside one another
_HALF = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Entry:
    """A prompt and where it stands."""

    where: str
    text: str
    beside: Mapping[str, Any]  # what else its line has


@dataclass(frozen=True)
class Listed:
    """Prompts of a source, and what of it is not used, in words."""

    prompts: tuple[Prompt, ...]
    unused: tuple[str, ...] = ()


def entry(where: str, value: object) -> Entry:
    """A text, or an object with a text under `prompt`.

    Raises:
        SettingError: for anything else; the message has the place.
    """
    if isinstance(value, str) and value.strip():
        return Entry(where, value.strip(), {})
    if isinstance(value, Mapping):
        text = value.get(KEY)
        if isinstance(text, str) and text.strip():
            return Entry(where, text.strip(), {key: other for key, other in value.items() if key != KEY})
        known = f"has {short(text)} as {KEY!r}" if KEY in value else f"has the keys {', '.join(_names(value))}"
    else:
        known = f"is {short(value)}"
    raise SettingError(f"{where} {known}; a text, or an object with a text under {KEY!r}, was expected", "prompts")


def lacking_column(where: str, names: Sequence[str]) -> SettingError:
    """What to say of a table without prompts: the way out where only the letters differ."""
    shown = ", ".join(map(repr, names[:20])) + (", ..." if len(names) > 20 else "")
    like = [name for name in names if name.strip().lower() == KEY]
    way = f"rename {like[0]!r}" if like else "call the column with the texts so"
    return SettingError(f"{where} has no column {KEY!r}, but {shown}; {way}", "prompts")


def columns_left_out(names: Sequence[str]) -> str:
    """What to say of columns that become no metadata."""
    which = "column" if len(names) == 1 else "columns"
    return f"{which} {', '.join(map(repr, names))}: values that JSON lacks, such as bytes or dates; not read"


def short(value: object) -> str:
    """A value as JSON has it, or its beginning."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def value_of(text: str) -> Any:
    """What JSON says.

    Raises:
        ValueError: if it is none, names a key twice, has numbers that are not finite, half a character, or is very
            deep; in words.
    """
    try:
        value = json.loads(text, object_pairs_hook=_once, parse_constant=_not_finite, parse_float=_finite)
        deep = "[" in text and _depth(value) > DEEPEST
    except RecursionError:
        deep = True
    if deep:
        raise ValueError(f"lists and objects lie more than {DEEPEST} deep in one another")
    if "\\u" in text and (half := _HALF.search(json.dumps(value, ensure_ascii=False))) is not None:
        raise ValueError(f"\\u{ord(half.group()):04x} is half of a character")
    return value


def _once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} is given twice")
        found[key] = value
    return found


def _not_finite(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number of JSON")


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        _not_finite(text)
    return value


def _depth(value: object) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(_depth, inner), default=0) if isinstance(value, dict | list) else 0


def _names(value: Iterable[object]) -> list[str]:
    return [str(key) for key in value] or ["(none)"]
