"""Specs and registries: how a name in an experiment file becomes a part.

A spec is a frozen pydantic model that names itself with ``kind: Literal["..."]`` and builds its part. A registry maps
those names to spec classes, one registry for each axis on which published methods differ.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Annotated, Any, ClassVar, Generic, Self, TypeVar, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SerializeAsAny

from aegpo.core import signatures
from aegpo.errors import AegpoError, PluginError

LONGEST_NAME = 100  # letters of experiments, arms and labels: they become names of files, which have 255 bytes at most
KEBAB_CASE = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


@dataclass(frozen=True)
class Where:
    """When a field is read: where another one of its spec has one of `values`; or any but these, if `other`."""

    field: str
    values: tuple[object, ...]
    other: bool = False


class Spec(BaseModel):
    """A frozen description of a part or a section; unknown keys are errors.

    A spec says in `read_where` which of its fields are read only under certain values of others: `check` warns of what
    was given and has no effect.

    Specs are equal if their classes have the same full name and all fields are equal: every load of a file narrows
    `Experiment` to the parts it finds, and what was computed from the fields does not count.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    read_where: ClassVar[Mapping[str, Where]] = {}
    _shipped_by: ClassVar[str] = "aegpo"  # the distribution, or the module as it was named; set where it is registered

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Spec) and _full_name(self) == _full_name(other) and _fields(self) == _fields(other)

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy with other values, which are not validated; what was computed from the old ones is computed anew.

        Raises:
            AegpoError: if the spec has no such field.
        """
        known = type(self).model_fields
        for name in update or ():
            if name not in known:
                raise AegpoError(f"{type(self).__name__} has no field {name!r}; {suggestion(name, known)}")
        copied = super().model_copy(update=update, deep=deep)
        for name in copied.__dict__.keys() - known.keys():
            del copied.__dict__[name]  # of a cached property
        return copied


S = TypeVar("S", bound=Spec)


@dataclass(frozen=True)
class Entry(Generic[S]):
    """One registered spec class and the distribution that ships it."""

    name: str
    spec: type[S]
    source: str

    @property
    def summary(self) -> str:
        """First line of the class's docstring."""
        return inspect.cleandoc(self.spec.__doc__ or "").splitlines()[0]


class Registry(Generic[S]):
    """Name -> spec class for one axis."""

    def __init__(self, axis: str, base: type[S]) -> None:
        self.axis = axis
        self.base = base
        self.source = "aegpo"  # who is registering right now; the plugin manager sets it
        self._entries: dict[str, Entry[S]] = {}

    def add(self, spec: type[S]) -> None:
        """Registers a spec class under the name its `kind` field gives.

        Raises:
            PluginError: if the class is not a spec of this axis, has no proper `kind`, no docstring, a taken name, or
                lacks a verb of its kind of part.
        """
        where = f"{self.source} registers {getattr(spec, '__name__', spec)!r} in {self.axis!r}"
        if not (inspect.isclass(spec) and issubclass(spec, self.base)):
            raise PluginError(f"{where}, which is not a subclass of {self.base.__name__}")
        name = kind_of(spec)
        if name is None or not KEBAB_CASE.fullmatch(name):
            raise PluginError(f"{where} without a kind: give it  kind: Literal['my-name'] = 'my-name'  (kebab-case)")
        if not inspect.cleandoc(spec.__dict__.get("__doc__") or ""):
            raise PluginError(f"{where} without a docstring; its first line is what 'aegpo plugins' shows")
        if name in self._entries:
            taken = self._entries[name].source
            blame = next((source for source in (self.source, taken) if source != "aegpo"), self.source)
            raise PluginError(
                f"{self.source} registers {self.axis} {name!r}, a name {taken} has taken; rename it, or leave the "
                f"plugin out with AEGPO_BLOCK_PLUGINS={blame}"
            )
        named = {*spec.read_where, *(other.field for other in spec.read_where.values())}
        if unknown := sorted(named - spec.model_fields.keys()):
            raise PluginError(
                f"{where} as {name!r}, whose 'read_where' names no field of it: {', '.join(map(repr, unknown))}; "
                f"{suggestion(unknown[0], spec.model_fields)}"
            )
        lacking = signatures.refusal(spec, self.base)
        if lacking is not None:
            raise PluginError(
                f"{where} as {name!r}, which {lacking}; mend it, or leave the plugin out with "
                f"AEGPO_BLOCK_PLUGINS={self.source}"
            )
        spec._shipped_by = self.source
        self._entries[name] = Entry(name, spec, self.source)

    def get(self, name: str) -> type[S]:
        """The spec class of a name.

        Raises:
            AegpoError: if nothing of that name is registered; the message has the nearest names.
        """
        if name not in self._entries:
            raise AegpoError(f"no {self.axis} part is called {name!r}; {suggestion(name, self.names)}")
        return self._entries[name].spec

    @property
    def names(self) -> tuple[str, ...]:
        """Registered names in the order they were added."""
        return tuple(self._entries)

    def __iter__(self) -> Iterator[Entry[S]]:
        return iter(self._entries.values())

    def union(self) -> Any:
        """The pydantic type of a field of this axis: a union over what is registered, discriminated by `kind`.

        A bare string is short for ``{kind: string}``.
        """
        members = tuple(entry.spec for entry in self)
        chosen: Any = members[0]
        if len(members) > 1:
            chosen = Annotated[reduce(or_, members), Field(discriminator="kind")]
        return Annotated[SerializeAsAny[chosen], BeforeValidator(expand_shorthand)]  # type: ignore[misc]


def _full_name(spec: Spec) -> tuple[str, str]:
    return type(spec).__module__, type(spec).__qualname__


def _fields(spec: Spec) -> dict[str, Any]:
    return {name: spec.__dict__[name] for name in type(spec).model_fields}


def kind_of(spec: type[Spec]) -> str | None:
    """The name a spec class gives itself, or None."""
    field = spec.model_fields.get("kind")
    if field is None or get_origin(field.annotation) is None:
        return None
    names = get_args(field.annotation)
    return names[0] if len(names) == 1 and isinstance(names[0], str) else None


def shipper(base: type[Spec], kind: str) -> str | None:
    """Who ships the registered part of a kind, unless it is aegpo itself."""
    for spec in base.__subclasses__():
        of = spec._shipped_by if kind_of(spec) == kind else shipper(spec, kind)
        if of not in (None, "aegpo"):
            return of
    return None


def shippers() -> dict[str, str]:
    """Who ships the plugins that registered parts, by the name of their module or package."""
    found: dict[str, str] = {}
    waiting: list[type[Spec]] = [Spec]
    while waiting:
        spec = waiting.pop()
        waiting += spec.__subclasses__()
        if vars(spec).get("_shipped_by", "aegpo") != "aegpo":
            found[spec.__module__.partition(".")[0]] = spec._shipped_by
    return found


def suggestion(wrong: str, known: Iterable[str]) -> str:
    """``did you mean 'x'?`` where one is close, else the list of what is known."""
    options: Sequence[str] = sorted(known)
    close = difflib.get_close_matches(wrong, options, n=1, cutoff=0.7)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(options) or 'none'}"


def expand_shorthand(value: object) -> object:
    """``name`` as ``{kind: name}``; anything else as it is."""
    return {"kind": value} if isinstance(value, str) else value
