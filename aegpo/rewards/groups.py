"""Which images a reward compares: those of equal prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from aegpo.core.records import Prompt
from aegpo.errors import AegpoError


def rows_to_compare(prompts: Sequence[Prompt], who: str) -> dict[tuple[str, tuple[Path, ...]], list[int]]:
    """The rows of each prompt's images, 2 or more, by what it asks; in the order in which prompts come first.

    Raises:
        AegpoError: if a prompt has a single image; the message begins with `who`.
    """
    groups: dict[tuple[str, tuple[Path, ...]], list[int]] = {}
    for row, prompt in enumerate(prompts):
        groups.setdefault(prompt.asked, []).append(row)
    lonely = [text for (text, _), rows in groups.items() if len(rows) < 2]
    if lonely:
        raise AegpoError(f"{who}: prompt {lonely[0]!r} has one image; a comparison needs two")
    return groups
