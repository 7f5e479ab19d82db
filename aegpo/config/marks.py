"""YAML values that know where they stand, and how patches merge into them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from aegpo.core.addresses import has_user
from aegpo.errors import SpecError

Key: TypeAlias = "str | int"
OPTION = "--set"  # the name of marks of options
_LONG, _SHOWN = 160, 74  # characters of a line: longer ones, as of a file that was written as JSON, are shown in part
_CUT = "..."  # where a line goes on


@dataclass(frozen=True)
class Mark:
    """A place in a text: 1-based line and column; `line` is None for texts without lines, such as an option."""

    name: str
    line: int | None
    column: int
    text: str  # the whole line

    @property
    def caret(self) -> str:
        """The line, indented, or what of a long one is near, and a caret under the column."""
        if has_user(self.text):
            return "  (the line is not shown: it has an address with a user, perhaps with a password)"
        text, place = self.text.expandtabs(1), self.column - 1
        if len(text) > _LONG:
            text, place = _around(text, place)
        return f"  {text}\n  {' ' * place}^"

    def __str__(self) -> str:
        return self.name if self.line is None else f"{self.name}:{self.line}:{self.column}"


def _around(text: str, place: int) -> tuple[str, int]:
    """What of a long line is near a place, within the width of any terminal, and where in it the place is."""
    start = min(max(0, place - _SHOWN // 2), max(0, len(text) - _SHOWN))
    before, after = _CUT if start else "", _CUT if start + _SHOWN < len(text) else ""
    shown = text[start + len(before) : start + _SHOWN - len(after)]
    return f"{before}{shown}{after}", place - start


@dataclass(frozen=True)
class Mistake:
    """One thing that is wrong in an experiment file, and where."""

    mark: Mark
    path: str  # dotted, may be empty
    message: str

    def __str__(self) -> str:
        path = f"{self.path}: " if self.path else ""
        return f"{self.mark}: {path}{self.message}\n{self.mark.caret}"


@dataclass(frozen=True)
class Marked:
    """A YAML value with the place where it stands and, in a mapping, the place of its key."""

    value: str | int | float | bool | tuple[Marked, ...] | Mapping[str, Marked] | None
    mark: Mark
    key: Mark

    @property
    def plain(self) -> Any:
        """The value without marks: dict, list or scalar."""
        if isinstance(self.value, Mapping):
            return {key: child.plain for key, child in self.value.items()}
        return [child.plain for child in self.value] if isinstance(self.value, tuple) else self.value

    @property
    def children(self) -> Mapping[str, Marked]:
        """The entries of a mapping; nothing for other values."""
        return self.value if isinstance(self.value, Mapping) else {}

    def find(self, location: tuple[Key, ...]) -> tuple[Marked, bool]:
        """The value at a location, or its deepest ancestor that is written down; True if it is the value itself."""
        if not location:
            return self, True
        head, *rest = location
        if isinstance(self.value, Mapping) and head in self.value:
            return self.value[str(head)].find(tuple(rest))
        if isinstance(self.value, tuple) and isinstance(head, int) and head < len(self.value):
            return self.value[head].find(tuple(rest))
        return self, False

    def without(self, *keys: str) -> Marked:
        """A mapping less some keys."""
        return replace(self, value={key: child for key, child in self.children.items() if key not in keys})


def dotted(location: tuple[Key, ...]) -> str:
    """``("rewards", 0, "weight")`` as ``rewards.0.weight``."""
    return ".".join(str(part) for part in location)


def merge(base: Marked, patch: Marked, *, indexed: bool = False, section: bool = False) -> Marked:
    """`base` with `patch` laid over it: mappings merge, everything else is replaced.

    A mapping that changes the `kind` replaces the part, and a part given by its bare name counts as `{kind: name}`.
    The optimizer is no part: most of its keys say how a step is dealt out to it, whatever its `kind`.

    Args:
        base: what is patched.
        patch: what changes.
        indexed: a mapping of positions laid over a list changes those items, as options do (`rewards.0.weight`).
        section: a change of the `kind` leaves the other keys as they are.
    """
    if not isinstance(patch.value, Mapping):
        return patch
    if indexed and isinstance(base.value, tuple) and all(key in _positions(base.value) for key in patch.value):
        items = list(base.value)
        for key, child in patch.value.items():
            items[int(key)] = merge(items[int(key)], child, indexed=True)
        return replace(base, value=tuple(items))
    base = replace(base, value={"kind": base}) if isinstance(base.value, str) else base
    if not isinstance(base.value, Mapping) or (not section and _changes_kind(base.value, patch.value)):
        return patch
    merged = dict(base.value)
    for key, child in patch.value.items():
        known = key in merged
        merged[key] = merge(merged[key], child, indexed=indexed, section=key == "optimizer") if known else child
    return replace(base, value=merged, key=patch.key, mark=patch.mark)


def _positions(items: tuple[Marked, ...]) -> set[str]:
    return {str(index) for index in range(len(items))}


def _changes_kind(base: Mapping[str, Marked], patch: Mapping[str, Marked]) -> bool:
    return "kind" in base and "kind" in patch and base["kind"].value != patch["kind"].value


def refuse(mistakes: list[Mistake]) -> None:
    """Raises what is wrong, in the order of the text and each once.

    Raises:
        SpecError: if there is anything.
    """
    if mistakes:
        ordered = sorted(
            dict.fromkeys(mistakes), key=lambda each: (each.mark.name, each.mark.line or 0, each.mark.column)
        )
        count = f"{len(ordered)} mistakes\n" if len(ordered) > 1 else ""
        raise SpecError(count + "\n".join(str(mistake) for mistake in ordered))
