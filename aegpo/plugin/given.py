"""Parts that are given as classes, such as those of a notebook's cells: registered as a plugin's are."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

from aegpo.core.hookspecs import hookimpl
from aegpo.core.registries import PART_AXES
from aegpo.core.registry import Registry, Spec
from aegpo.errors import PluginError

NAME = "parts given in Python"  # who ships them, in messages


class GivenParts:
    """A plugin that registers classes."""

    def __init__(self, parts: Iterable[type[Spec]]) -> None:
        """`parts`: spec classes of any axis, each once however often it is named.

        Raises:
            PluginError: for something that is no spec class of a part.
        """
        by_axis: dict[str, list[type[Spec]]] = {}
        for part in dict.fromkeys(parts):
            by_axis.setdefault(_axis(part), []).append(part)
        for axis, classes in by_axis.items():
            setattr(self, f"aegpo_register_{axis}", hookimpl(_adding(classes)))


def _axis(part: type[Spec]) -> str:
    for axis, base in PART_AXES.items():
        if inspect.isclass(part) and issubclass(part, base):
            return axis
    bases = ", ".join(base.__name__ for base in PART_AXES.values())
    raise PluginError(f"{NAME}: {part!r} is no class of a part; it extends none of {bases}")


def _adding(classes: list[type[Spec]]) -> Callable[[Registry[Any]], None]:
    def add(registry: Registry[Any]) -> None:
        for each in classes:
            registry.add(each)

    return add
