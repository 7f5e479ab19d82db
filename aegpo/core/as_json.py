"""JSON that every reader of JSON reads, with the numbers that JSON lacks.

A loss may become NaN and a ratio infinite; JSON has neither. Such a number is written as an object that nothing else
looks like, so that no text is ever mistaken for a number, nor the other way round:

    {"loss": {"float": "NaN"}, "ratio": {"float": "Infinity"}, "clipped": 0.25}

Finite numbers are written as Python writes them and keep every bit. What earlier versions wrote, the bare words NaN and
Infinity, is read as well.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

_KEY = "float"
_NAMED = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def dumps(value: Any, indent: int | None = None) -> str:
    """Plain data as JSON."""
    try:
        return json.dumps(value, indent=indent, allow_nan=False)
    except ValueError:  # a number that JSON lacks
        return json.dumps(_named(value), indent=indent, allow_nan=False)


def loads(text: str | bytes) -> Any:
    """The plain data that `dumps` was given.

    Raises:
        ValueError: if it is not JSON.
    """
    try:
        return json.loads(text, object_hook=_number)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _named(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _named(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_named(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {_KEY: "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"}
    return value


def _number(found: dict[str, Any]) -> Any:
    name = found.get(_KEY)
    return _NAMED[name] if len(found) == 1 and isinstance(name, str) and name in _NAMED else found
