"""What stands in for packages and parts that a rival imports and a comparison does not need."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock


class _Standin(ModuleType):
    """A module in which every name is something that can be called and does nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock(name=f"{self.__name__}.{name}")


class _Finder:
    """Finds stand-ins for some modules and all that is inside them."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = tuple(names)

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if any(name == own or name.startswith(f"{own}.") for own in self._names):
            return ModuleSpec(name, self, is_package=True)  # type: ignore[arg-type] # it has both methods
        return None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Standin(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


@contextlib.contextmanager
def importing(checkout: Path, missing: Sequence[str] = (), instead: Sequence[str] = ()) -> Iterator[None]:
    """Inside, modules of a checkout can be imported.

    Args:
        checkout: folder that its packages lie in.
        missing: packages that have a stand-in if they are not installed.
        instead: modules that have one although they are there.
    """
    first, last = _Finder(instead), _Finder(missing)
    sys.path.insert(0, str(checkout))
    sys.meta_path.insert(0, first)
    sys.meta_path.append(last)
    try:
        yield
    finally:
        sys.meta_path.remove(first)
        sys.meta_path.remove(last)
        for name, module in list(sys.modules.items()):
            if isinstance(module, _Standin):
                del sys.modules[name]  # whoever imported it has it; others must not take it for the package


class Overlay(ModuleType):
    """A module with some names changed, for a rival's module to use instead of it."""

    def __init__(self, module: ModuleType, changed: Mapping[str, Any]) -> None:
        super().__init__(module.__name__)
        self._module, self._changed = module, changed

    def __getattr__(self, name: str) -> Any:
        changed = self.__dict__["_changed"]
        return changed[name] if name in changed else getattr(self.__dict__["_module"], name)


def no_autocast(*args: Any, **kwargs: Any) -> contextlib.AbstractContextManager[None]:
    """In place of `torch.autocast`."""
    return contextlib.nullcontext()
