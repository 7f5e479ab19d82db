"""YAML texts as marked values, read no further than an experiment goes: so deep, so many values, so large.

PyYAML composes the node tree; scalars are resolved here by the core schema of YAML 1.2, so that `1e-4` is a number
and `no` is a word.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import yaml
from yaml.reader import Reader

from aegpo.config.marks import Key, Mark, Marked, Mistake, dotted

DEEPEST = 32  # lists and mappings inside one another; experiments have 7
MOST_VALUES = 5_000  # what an alias stands for counts where it stands; the largest experiments have some 500
MOST_CHARACTERS = 200_000
_INT = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_MOST_DIGITS, _LARGEST = 19, 2**63 - 1  # of whole numbers
_WORDS: Mapping[str, bool | None] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_BREAKS = re.compile("[\x85\u2028\u2029]")  # at which PyYAML begins a line, and no editor does
_NO_TEXT = re.compile("[\0\ud800-\udfff]")  # what no file, path or JSON can hold


def parse(text: str, name: str, *, lines: bool = True, indent: str = "") -> tuple[Marked | None, list[Mistake]]:
    """The marked value of a YAML text, None if it is empty or cannot be read, and the mistakes in it.

    Args:
        text: one YAML document.
        name: what marks call it: the file, or the option it was given with.
        lines: False if the text is not a file, so that marks have no line.
        indent: what stands before the text where it is shown; columns count from its start.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    rows = text.split("\n")

    def mark(line: int, column: int) -> Mark:
        shown = indent + (rows[line] if line < len(rows) else "")
        return Mark(name, line + 1 if lines else None, column + 1 + len(indent), shown)

    if len(text) > MOST_CHARACTERS:
        what = f"has {len(text):,} characters; an experiment has {MOST_CHARACTERS:,} at most"
        return None, [Mistake(mark(0, 0), "", what)]
    if (found := Reader.NON_PRINTABLE.search(text) or _BREAKS.search(text)) is not None:
        place = found.start()
        line, start = text.count("\n", 0, place), text.rfind("\n", 0, place) + 1
        what = (
            f"the character {_code(found.group())} cannot stand here as it is; remove it, or write it in double quotes"
        )
        return None, [Mistake(mark(line, place - start), "", f"{what}: {_escaped(found.group())}")]
    try:
        node = _Loader(text).get_single_node()
    except yaml.MarkedYAMLError as error:
        at = error.problem_mark or error.context_mark
        context = f" {error.context}" if error.context else ""
        why = error.problem if isinstance(error, _TooMuchError) else f"not YAML: {error.problem}{context}"
        return None, [Mistake(mark(at.line, at.column) if at is not None else mark(0, 0), "", str(why))]
    if node is None:
        return None, []
    reader = _Reader(lambda place: mark(place.line, place.column))
    return reader.read(node, (), mark(node.start_mark.line, node.start_mark.column)), reader.mistakes


def _code(character: str) -> str:
    return f"U+{ord(character):04X}"


def _escaped(character: str) -> str:
    number = ord(character)
    return (
        f'"\\x{number:02x}"' if number < 0x100 else f'"\\u{number:04x}"' if number < 0x10000 else f'"\\U{number:08x}"'
    )


class _TooMuchError(yaml.MarkedYAMLError):
    """YAML that has more than an experiment has."""


class _Loader(yaml.SafeLoader):
    """PyYAML without its YAML 1.1 reading of scalars, every untagged one composes as text; and with an end."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (the class attribute PyYAML looks up)

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._reached = self._values = 0
        self._known: dict[int, tuple[yaml.Node, int, int]] = {}  # how many values a node has, and levels below it

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """The next node, unless there are too many or it lies too deep."""
        event, values, reached = self.peek_event(), self._values, self._reached  # type: ignore[no-untyped-call]
        self._depth += 1
        self._values += 1
        self._reached = self._depth
        self._check(event.start_mark)
        node = super().compose_node(parent, index)
        if isinstance(event, yaml.AliasEvent):
            _, more, below = self._known.get(id(node), (node, 1, 0))
            self._values += more - 1
            self._reached += below
            self._check(event.start_mark)
        elif node is not None:
            self._known[id(node)] = node, self._values - values, self._reached - self._depth
        self._reached = max(reached, self._reached)
        self._depth -= 1
        return node

    def _check(self, place: Any) -> None:
        """Refuses what no experiment has."""
        if self._reached > DEEPEST:
            what = f"nested deeper than {DEEPEST} lists and mappings, with what aliases stand for; write less into it"
            raise _TooMuchError(problem=what, problem_mark=place)
        if self._values > MOST_VALUES:
            what = f"more than {MOST_VALUES:,} values, with what aliases stand for; write fewer"
            raise _TooMuchError(problem=what, problem_mark=place)


class _Reader:
    """Turns composed nodes into marked values."""

    def __init__(self, mark: Callable[[yaml.Mark], Mark]) -> None:
        self.mark = mark
        self.mistakes: list[Mistake] = []
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
            where = (*path, self._text(key.value, path, mark))
            if key.value in seen:
                first = seen[key.value]
                self._wrong(mark, where, f"duplicate key, first given at {first}; keep one")
                continue
            seen[key.value] = mark
            yield key.value, self.read(child, where, mark)

    def _scalar(self, node: yaml.ScalarNode, path: tuple[Key, ...], mark: Mark) -> str | int | float | bool | None:
        text = self._text(node.value, path, mark)
        if node.style is not None:
            return text
        if text in _WORDS:
            return _WORDS[text]
        if _INT.fullmatch(text):
            return self._whole_number(text, path, mark)
        if _NOT_FINITE.fullmatch(text) or _FLOAT.fullmatch(text):
            return self._number(text, path, mark)
        return text

    def _text(self, text: str, path: tuple[Key, ...], mark: Mark) -> str:
        if (found := _NO_TEXT.search(text)) is not None:
            self._wrong(mark, path, f"has the character {_code(found.group())}, which text cannot have; remove it")
        return text

    def _whole_number(self, text: str, path: tuple[Key, ...], mark: Mark) -> int:
        digits = text.lstrip("+-").lstrip("0") or "0"
        if len(digits) > _MOST_DIGITS or int(digits) > _LARGEST:
            what = f"{text:.40} is beyond whole numbers, which end at {_LARGEST}; give a smaller one"
            self._wrong(mark, path, what)
            return 0
        return -int(digits) if text.startswith("-") else int(digits)

    def _number(self, text: str, path: tuple[Key, ...], mark: Mark) -> float:
        if _NOT_FINITE.fullmatch(text) or not math.isfinite(float(text)):
            self._wrong(mark, path, f"{text:.40} is not a finite number; give a finite one")
            return 0.0
        value = float(text)
        if value == 0 and re.search("[1-9]", re.split("[eE]", text)[0]):
            self._wrong(mark, path, f"{text:.40} is too near to 0 to be told from it; write 0, or a larger number")
        return value

    def _wrong(self, mark: Mark, path: tuple[Key, ...], message: str) -> None:
        self.mistakes.append(Mistake(mark, dotted(path), message))
