"""YAML values that know where they stand, and how patches merge into them.

PyYAML composes the node tree; scalars are resolved here by the core schema of YAML 1.2, so that `1e-4` is a number
and `no` is a word.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import yaml

from aegpo.errors import SpecError

Key: TypeAlias = "str | int"
OPTION = "--set"  # the name of marks of options
_INT = re.compile(r"[-+]?[0-9]{1,18}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_WORDS: Mapping[str, bool | None] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}


@dataclass(frozen=True)
class Mark:
    """A place in a text: 1-based line and column; `line` is None for texts without lines, such as an option."""

    name: str
    line: int | None
    column: int
    text: str  # the whole line

    @property
    def caret(self) -> str:
        """The line, indented, and a caret under the column."""
        return f"  {self.text.expandtabs(1)}\n  {' ' * (self.column - 1)}^"

    def __str__(self) -> str:
        return self.name if self.line is None else f"{self.name}:{self.line}:{self.column}"


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


def parse(text: str, name: str, *, lines: bool = True, indent: str = "") -> tuple[Marked | None, list[Mistake]]:
    """The marked value of a YAML text, None if it is empty or cannot be read, and the mistakes in it.

    Args:
        text: one YAML document.
        name: what marks call it: the file, or the option it was given with.
        lines: False if the text is not a file, so that marks have no line.
        indent: what stands before the text where it is shown; columns count from its start.
    """
    rows = text.splitlines() or [""]

    def mark(place: yaml.Mark | None) -> Mark:
        line, column = (place.line, place.column) if place is not None else (0, 0)
        shown = indent + (rows[line] if line < len(rows) else "")
        return Mark(name, line + 1 if lines else None, column + 1 + len(indent), shown)

    try:
        node = _Loader(text).get_single_node()
    except yaml.MarkedYAMLError as error:
        context = f" {error.context}" if error.context else ""
        place = mark(error.problem_mark or error.context_mark)
        return None, [Mistake(place, "", f"not YAML: {error.problem}{context}")]
    except yaml.reader.ReaderError as error:
        row = text.count("\n", 0, error.position)
        place = Mark(name, row + 1 if lines else None, 1, indent)
        return None, [Mistake(place, "", f"not YAML: {error.reason} (character {error.character:#x})")]
    if node is None:
        return None, []
    mistakes: list[Mistake] = []
    return _Reader(mark, mistakes).read(node, (), mark(node.start_mark)), mistakes


class _Loader(yaml.SafeLoader):
    """PyYAML without its YAML 1.1 reading of scalars: every untagged one composes as text."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (the class attribute PyYAML looks up)


class _Reader:
    """Turns composed nodes into marked values."""

    def __init__(self, mark: Any, mistakes: list[Mistake]) -> None:
        self.mark = mark
        self.mistakes = mistakes
        self.open: list[yaml.Node] = []  # aliases may lead back into these

    def read(self, node: yaml.Node, path: tuple[Key, ...], key: Mark) -> Marked:
        """The marked value of one node."""
        mark = self.mark(node.start_mark)
        if any(node is ancestor for ancestor in self.open):
            self._wrong(mark, path, "an alias of something it is inside of; write the value out")
            return Marked(None, mark, key)
        if not node.tag.startswith("tag:yaml.org,2002:") or node.tag.rpartition(":")[2] not in ("str", "seq", "map"):
            self._wrong(mark, path, f"the tag {node.tag!r} is not supported; write a plain value")
        self.open.append(node)
        try:
            return Marked(self._value(node, path, mark), mark, key)
        finally:
            self.open.pop()

    def _value(self, node: yaml.Node, path: tuple[Key, ...], mark: Mark) -> Any:
        if isinstance(node, yaml.MappingNode):
            return dict(self._entries(node, path))
        if isinstance(node, yaml.SequenceNode):
            return tuple(
                self.read(child, (*path, i), self.mark(child.start_mark)) for i, child in enumerate(node.value)
            )
        assert isinstance(node, yaml.ScalarNode), "YAML has three kinds of node"
        return self._scalar(node, path, mark)

    def _entries(self, node: yaml.MappingNode, path: tuple[Key, ...]) -> Iterator[tuple[str, Marked]]:
        seen: dict[str, Mark] = {}
        for key, child in node.value:
            mark = self.mark(key.start_mark)
            if not isinstance(key, yaml.ScalarNode):
                self._wrong(mark, path, "a key must be a name, not a list or a mapping")
                continue
            where = (*path, key.value)
            if key.value in seen:
                first = seen[key.value]
                self._wrong(mark, where, f"duplicate key, first given at {first}; keep one")
                continue
            seen[key.value] = mark
            yield key.value, self.read(child, where, mark)

    def _scalar(self, node: yaml.ScalarNode, path: tuple[Key, ...], mark: Mark) -> str | int | float | bool | None:
        text: str = node.value
        if node.style is not None:
            return text
        if text in _WORDS:
            return _WORDS[text]
        if _INT.fullmatch(text):
            return int(text)
        if _NOT_FINITE.fullmatch(text) or (_FLOAT.fullmatch(text) and not math.isfinite(float(text))):
            self._wrong(mark, path, f"{text} is not a finite number; give a finite one")
            return 0.0
        return float(text) if _FLOAT.fullmatch(text) else text

    def _wrong(self, mark: Mark, path: tuple[Key, ...], message: str) -> None:
        self.mistakes.append(Mistake(mark, dotted(path), message))


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
