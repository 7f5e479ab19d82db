"""JSON of strangers: read only as far as it has a size that memory and the stack can bear."""

from __future__ import annotations

import json
from typing import Any

DEEPEST = 64  # lists and mappings inside one another
_BYTES = 16  # of a text per value it may have: a value takes some 70 in memory


def most_values(size: int) -> int:
    """How many values a text of at most `size` bytes may have."""
    return size // _BYTES


def loads(text: str | bytes, most: int) -> Any:
    """What the JSON says.

    Args:
        text: UTF-8, or text.
        most: Values it may have, those in lists and mappings counted; commas in texts count as if they were between
            values.

    Raises:
        ValueError: if it is no JSON, has more values or is deeper; in words.
    """
    marks: tuple[Any, ...] = ("[", "{", ",", ":") if isinstance(text, str) else (b"[", b"{", b",", b":")
    given = sum(text.count(mark) for mark in marks)
    if given > most:
        raise ValueError(f"it has {given} values and more; {most} at most were expected")
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(f"it is too deep; {DEEPEST} lists and mappings inside one another at most") from None
    if _deeper(value, DEEPEST):
        raise ValueError(f"it is too deep; {DEEPEST} lists and mappings inside one another at most")
    return value


def _deeper(value: Any, depth: int) -> bool:
    """Whether lists and mappings are inside one another more than `depth` times."""
    level = [value]
    for _ in range(depth):
        level = [
            inner
            for each in level
            if isinstance(each, dict | list)
            for inner in (each.values() if isinstance(each, dict) else each)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True
