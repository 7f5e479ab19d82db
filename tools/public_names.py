"""Writes every public name and signature to tests/data/public_names.txt; `--check` only shows what differs.

Public is what `aegpo`, `aegpo.pipelines` and `aegpo.testing` list in `__all__`. Of a class that is: its nearest base
that is public or of a library, fields with annotations and defaults in their order, class variables, properties and
methods, also those it has from bases in between. A plugin goes on working while the list only grows.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import importlib
import inspect
import sys
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from types import FunctionType
from typing import Any, Literal, get_origin

from pydantic import BaseModel

DOORS = ("aegpo", "aegpo.pipelines", "aegpo.testing")
LIST = Path(__file__).parent.parent / "tests" / "data" / "public_names.txt"
COMMAND = "python tools/public_names.py"
_SPOKEN = ("__init__", "__call__", "__iter__", "__len__")  # methods with underscores that callers use


@dataclasses.dataclass(frozen=True)
class _Text:
    """An annotation as it is written in the source."""

    text: str

    def __repr__(self) -> str:
        return self.text


def public_names() -> str:
    """The list: one name a line, what belongs to a class indented below it."""
    modules = [importlib.import_module(door) for door in DOORS]
    known = {value for module in modules for value in vars(module).values() if inspect.isclass(value)}
    lines: list[str] = []
    for module in modules:
        for name in sorted(module.__all__):
            lines += described(f"{module.__name__}.{name}", vars(module)[name], known)
    return "\n".join(lines) + "\n"


def described(name: str, value: Any, known: set[type]) -> Iterator[str]:
    """The lines of one name; members of the classes in `known` are not said again below their subclasses."""
    if inspect.isclass(value):
        base = next(each for each in value.__mro__[1:] if each in known or not _is_ours(each))
        yield f"class {name}" + ("" if base is object else f"({base.__name__})")
        yield from (f"    {line}" for line in _members(value, known))
    elif isinstance(value, FunctionType):
        yield f"def {name}{_signature(value)}"
    elif isinstance(value, str | int | float | tuple) or get_origin(value) is Literal:
        yield f"{name} = {value!r}"
    elif get_origin(value) is not None:
        yield name  # an alias, which libraries spell differently from version to version
    else:
        yield f"{name}: {type(value).__name__}"


def _members(cls: type, known: set[type]) -> Iterator[str]:
    said = [each for each in cls.__mro__ if each in known and each is not cls]
    own = [each for each in cls.__mro__ if _is_ours(each) and not any(issubclass(base, each) for base in said)]
    seen: set[str] = set()
    for each in own:
        for name, annotation in inspect.get_annotations(each).items():
            if name not in seen and not name.startswith("_"):
                seen.add(name)
                yield f"{name}: {annotation}{_default(cls, name)}"
        for name, member in vars(each).items():
            if name in seen or not _is_spoken(cls, name):
                continue
            seen.add(name)
            if isinstance(member, property | cached_property):
                getter = member.fget if isinstance(member, property) else member.func
                yield f"{name} -> {getter.__annotations__['return']}"
            elif isinstance(member, FunctionType):
                yield f"def {name}{_signature(member)}"


def _is_ours(cls: type) -> bool:
    return cls.__module__.partition(".")[0] not in ("builtins", "pydantic", "typing", "abc")


def _is_spoken(cls: type, name: str) -> bool:
    if name == "__init__" and (dataclasses.is_dataclass(cls) or issubclass(cls, BaseModel) or _is_protocol(cls)):
        return False  # it follows from the fields, or is there to be replaced
    return name in _SPOKEN or not name.startswith(("_", "model_"))


def _is_protocol(cls: type) -> bool:
    return bool(cls.__dict__.get("_is_protocol", False))


def _default(cls: type, name: str) -> str:
    if issubclass(cls, BaseModel) and name in cls.model_fields:
        field = cls.model_fields[name]
        if field.default_factory is not None:
            return " = ..."
        return "" if field.is_required() else f" = {_brief(field.default)}"
    for item in dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ():
        if item.name == name and item.default_factory is not dataclasses.MISSING:
            return " = ..."
    for each in cls.__mro__:
        if name in vars(each) and not inspect.isdatadescriptor(vars(each)[name]):
            return f" = {_brief(vars(each)[name])}"
    return ""


def _brief(value: Any) -> str:
    """A section's own defaults are listed where the section is."""
    return f"{type(value).__name__}()" if isinstance(value, BaseModel) else repr(value)


def _signature(function: FunctionType) -> str:
    signature = inspect.signature(function)
    parameters = [
        parameter if parameter.annotation is parameter.empty else parameter.replace(annotation=_written(parameter))
        for parameter in signature.parameters.values()
    ]
    returns: Any = signature.return_annotation
    if returns is not inspect.Signature.empty:
        returns = _Text(returns if isinstance(returns, str) else inspect.formatannotation(returns))
    return str(signature.replace(parameters=parameters, return_annotation=returns))


def _written(parameter: inspect.Parameter) -> _Text:
    given: Any = parameter.annotation
    return _Text(given if isinstance(given, str) else inspect.formatannotation(given))


def difference(old: str, new: str) -> str:
    """What changes from the list to the code; empty if nothing does."""
    lines = difflib.unified_diff(old.splitlines(), new.splitlines(), "the list", "the code", lineterm="", n=1)
    return "\n".join(lines)


def main() -> int:
    """Writes, or checks; 1 if a check fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, show what differs")
    check = parser.parse_args().check
    new = public_names()
    if check:
        found = difference(LIST.read_text(encoding="utf-8"), new)
        sys.stdout.write(found + "\n" if found else "")
        return int(bool(found))
    LIST.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
