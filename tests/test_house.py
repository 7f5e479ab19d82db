"""The house: no circles between modules, rooms that say what lives in them, plugins that come in by the door."""

from __future__ import annotations

import ast
import importlib
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import grimp
import pytest

import aegpo

ROOT = Path(__file__).parent.parent
ROOMS = sorted(path.parent.name for path in (ROOT / "aegpo").glob("*/__init__.py"))
DOORS = {"aegpo", "aegpo.pipelines", "aegpo.testing"}
# It looks into a finished run, its weights and its start noise, for which plugins have no door.
INSIDERS = {"test_qwen_image_runs.py"}
PLUGIN_FILES = sorted((ROOT / "plugins").rglob("*.py"))


@pytest.fixture(scope="module")
def imports() -> dict[str, set[str]]:
    """Module -> what it imports, also in functions and for type checkers."""
    graph = grimp.build_graph("aegpo", exclude_type_checking_imports=False, cache_dir=None)
    return {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}


def circle(imports: dict[str, set[str]]) -> list[str]:
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_no_modules_import_each_other_in_a_circle(imports):
    """Stricter than the contract on siblings: a folder's own `__init__` and the modules in it count, too."""
    assert not circle(imports)


def test_a_circle_would_be_found(imports):
    assert "aegpo.core.parts" in imports["aegpo.models.flux"]
    assert {"aegpo.errors", "aegpo.core.registry"} <= set(circle({**imports, "aegpo.errors": {"aegpo.core.registry"}}))


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_says_what_lives_in_it_and_what_it_imports(room):
    said = importlib.import_module(f"aegpo.{room}").__doc__
    assert said.startswith(f"{room.capitalize()}: ")
    assert re.search(r"\b([Ii]mports|import)\b", said)


def inside(source: str) -> set[str]:
    """What a plugin's module imports of aegpo that is no door and no name of one."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            found |= {node.module} if node.module != "aegpo" else {f"aegpo.{alias.name}" for alias in node.names}
    return {name for name in found if name.startswith("aegpo.")} - DOORS - {f"aegpo.{name}" for name in aegpo.__all__}


@pytest.mark.parametrize("path", PLUGIN_FILES, ids=lambda path: str(path.relative_to(ROOT / "plugins")))
def test_a_plugin_of_this_repository_comes_in_by_the_door(path):
    assert bool(inside(path.read_text(encoding="utf-8"))) == (path.name in INSIDERS)


def test_the_guide_shows_no_other_way_in():
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "plugins" / "README.md").read_text(), flags=re.DOTALL):
        assert not inside(block)
        assert not re.findall(r"aegpo\.(?:core|method|models|rewards|train|runs)\b", block)


@pytest.mark.parametrize("line", ["import aegpo.core.parts", "from aegpo.core import parts", "from aegpo import core"])
def test_another_way_in_would_be_found(line):
    assert inside(line)


def posix_only(source: str) -> set[str]:
    """What a module imports at its top, whatever runs it, that Windows does not have."""
    found: set[str] = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or ""}
    return found & {"fcntl", "grp", "posix", "pty", "pwd", "resource", "termios"}


@pytest.mark.parametrize("path", sorted((ROOT / "aegpo").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_can_be_imported_without_posix(path):
    assert not posix_only(path.read_text(encoding="utf-8"))


def test_a_module_that_needs_posix_would_be_found():
    assert posix_only("import os\nimport fcntl\nfrom pwd import getpwuid\n") == {"fcntl", "pwd"}
