"""Places on disk that fields of specs name: which fields do, and how a place is told from a repository of the hub."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from aegpo.core.problems import Location
from aegpo.core.registry import Spec, kind_of


@dataclass(frozen=True)
class _LocalOrHub:
    """The mark of texts that name a file or folder, or a repository of the hub."""


_MARK = _LocalOrHub()
LocalOrHub = Annotated[str, _MARK]
_EXPLICIT = ("./", "../", "~", f".{os.sep}", f"..{os.sep}")


@dataclass(frozen=True)
class NamedPlace:
    """A text in the data of a spec that names a place."""

    location: Location
    text: str
    hub: bool  # it may name a repository of the hub instead

    @property
    def only_local(self) -> bool:
        """True if it can be no repository of the hub: `org/name` and `name` are the forms those have."""
        if not self.hub:
            return True
        folders = self.text.count("/") > 1 or (os.sep != "/" and os.sep in self.text)
        return Path(self.text).is_absolute() or self.text.startswith(_EXPLICIT) or folders


def named_places(spec: type[Spec], data: object) -> Iterator[NamedPlace]:
    """Every place that the plain data of a spec names: in fields of type `Path`, and in those of `LocalOrHub`."""
    yield from _of_spec(spec, data, ())


def absolute(text: str, folder: Path) -> Path:
    """The place that a text names, seen from a folder; links stay in it.

    Raises:
        ValueError: if it begins with the home of somebody who has none; the message says so.
    """
    try:
        joined = folder / Path(text).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{text!r} begins with a home folder that is not known; write the path out") from error
    tidy = Path(os.path.normpath(joined))
    # behind a link '..' is not where it seems
    return tidy if not is_there(joined) or same_file(joined, tidy) else joined.resolve()


def is_there(path: Path) -> bool:
    """True if there is such a file or folder; what cannot be looked at is not there."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def cache_folder(given: Path | None) -> Path:
    """`given`, else $AEGPO_CACHE, else $XDG_CACHE_HOME/aegpo, else ~/.cache/aegpo."""
    if given is not None:
        return given.expanduser()
    if own := os.environ.get("AEGPO_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "aegpo"


def same_file(one: Path, other: Path) -> bool:
    """True if both are there and are the same."""
    try:
        return one.samefile(other)
    except (OSError, ValueError):
        return False


def _of_spec(spec: type[Spec], data: object, place: Location) -> Iterator[NamedPlace]:
    if isinstance(data, Mapping):
        for name, field in spec.model_fields.items():
            if name in data:
                yield from _of_value(_field_types(spec, name, field), data[name], (*place, name))


def _of_value(types: list[Any], value: object, place: Location) -> Iterator[NamedPlace]:
    if isinstance(value, str):
        hub = _MARK in types
        address = hub and "://" in value  # for other programs, such as hf://datasets/org/name
        if (hub or any(_is_path(each) for each in types)) and not address:
            yield NamedPlace(place, value, hub)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            items = [member for each in types for member in _members(_item_type(each, index))]
            yield from _of_value(items, item, (*place, index))
    elif isinstance(value, Mapping):
        specs = [each for each in types if isinstance(each, type) and issubclass(each, Spec)]
        kinds = [each for each in specs if kind_of(each) == value.get("kind", place[-1] if place else None)]
        if len(specs) == 1 or kinds:
            yield from _of_spec((kinds or specs)[0], value, place)
        for key, item in value.items():
            values = [member for each in types for member in _members(_value_type(each))]
            yield from _of_value(values, item, (*place, key)) if values else ()


def _field_types(spec: type[Spec], name: str, field: FieldInfo) -> list[Any]:
    """The types of a field, with the mark if it has it, or the field of that name of a class this one is made from."""
    types = _members(field.annotation)
    bases = [each.model_fields[name] for each in spec.__mro__ if issubclass(each, Spec) and name in each.model_fields]
    marked = any(_MARK in (*base.metadata, *_members(base.annotation)) for base in bases)
    return [*types, _MARK] if marked else types


def _members(annotation: Any) -> list[Any]:
    """The types an annotation allows, without unions and annotations around them; the mark is kept."""
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *extras = get_args(annotation)
        return [*_members(inner), *(extra for extra in extras if extra == _MARK)]
    if origin in (Union, UnionType):
        return [member for argument in get_args(annotation) for member in _members(argument)]
    return [] if annotation is None else [annotation]


def _is_path(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, PurePath)


def _item_type(kind: Any, index: int) -> Any:
    """The type of one item of a list or tuple; None for other types."""
    arguments, origin = get_args(kind), get_origin(kind)
    if origin is tuple and not (len(arguments) == 2 and arguments[1] is Ellipsis):
        return arguments[index] if index < len(arguments) else None
    plural = isinstance(origin, type) and not issubclass(origin, Mapping | str)
    return arguments[0] if plural and arguments else None


def _value_type(kind: Any) -> Any:
    """The type of the values of a mapping; None for other types."""
    arguments, origin = get_args(kind), get_origin(kind)
    return arguments[1] if isinstance(origin, type) and issubclass(origin, Mapping) and len(arguments) == 2 else None
