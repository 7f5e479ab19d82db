"""Experiments given as Python objects, as the texts of a file: they go through the same checks, by the same words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from aegpo.core.registry import Spec, kind_of
from aegpo.errors import SpecError

NAME = "experiment"  # what messages call a mapping; places in it are seen from the working directory


def as_text(given: Mapping[str, Any]) -> str:
    """A mapping as YAML; specs in it as what was set of them.

    Raises:
        SpecError: for a value that no experiment file can hold.
    """
    try:
        return yaml.safe_dump(plain(given), sort_keys=False, allow_unicode=True, width=2**31)
    except yaml.representer.RepresenterError as error:
        what = error.args[1] if len(error.args) > 1 else error
        raise SpecError(
            f"{NAME}: a {type(what).__name__} cannot stand in an experiment: {what!r}; give numbers, texts, lists, "
            "mappings, paths or specs"
        ) from error


def plain(given: object) -> object:
    """The same as plain data: of specs what was set, with their kind; paths as texts.

    Raises:
        SpecError: for a mapping with a key that is no text.
    """
    if isinstance(given, Spec):
        kind = kind_of(type(given))
        fields = {name: plain(value) for name, value in given if name in given.model_fields_set and name != "kind"}
        return fields if kind is None else {"kind": kind, **fields}
    if isinstance(given, Mapping):
        return {_key(key): plain(value) for key, value in given.items()}
    if isinstance(given, list | tuple):
        return [plain(each) for each in given]
    return str(given) if isinstance(given, Path) else given


def spec_classes(given: object) -> Iterator[type[Spec]]:
    """The class of every part in a mapping or spec, as often as it is there."""
    if isinstance(given, Spec):
        if kind_of(type(given)) is not None:
            yield type(given)
        given = dict(given)
    if isinstance(given, Mapping):
        given = tuple(given.values())
    if isinstance(given, list | tuple):
        for each in given:
            yield from spec_classes(each)


def _key(key: object) -> str:
    if not isinstance(key, str):
        raise SpecError(f"{NAME}: {key!r} is no text; the keys of an experiment are texts")
    return key
