"""What experiments of earlier versions had under other keys: told in files, read in the folders of runs."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

PROBE = "probe"  # the section of version 0.1 that is the source `entropy` now


def moved(key: str, value: object) -> str | None:
    """Where a key of a file went, with the lines to write; None if there never was such a key."""
    if key != PROBE:
        return None
    given = value if isinstance(value, Mapping) else {}
    options = ", ".join(f"{name}: {_as_yaml(each)}" for name, each in given.items())
    return f"is the source 'entropy' of signals since 0.2; write\n  signals:\n    entropy: {{{options}}}"


def modern(experiment: Mapping[str, Any]) -> dict[str, Any]:
    """The experiment of a manifest, under the keys of today."""
    data = dict(experiment)
    probe = data.pop(PROBE, None)
    return data if probe is None else {**data, "signals": {"entropy": probe}}


def _as_yaml(value: object) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_as_yaml, value))}]"
    plain = isinstance(value, str) and re.fullmatch(r"[A-Za-z][\w-]*", value) is not None
    return str(value) if plain else json.dumps(value, default=str)
