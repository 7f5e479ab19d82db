"""What is found wrong with an experiment, and where."""

from __future__ import annotations

from dataclasses import dataclass

Location = tuple[str | int, ...]


@dataclass(frozen=True)
class Problem:
    """Something a valid file still gets wrong, found by looking at several fields together."""

    location: Location
    message: str
    warning: bool = False  # possible, but probably not what was meant
