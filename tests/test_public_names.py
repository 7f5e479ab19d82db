"""What plugins may rely on: the list of public names, and doors that need no torch."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal

import pytest

import aegpo

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))
try:
    import public_names
finally:
    sys.path.pop(0)


def test_every_public_name_and_signature_is_that_of_the_list():
    found = public_names.difference(public_names.LIST.read_text(encoding="utf-8"), public_names.public_names())
    assert not found, (
        f"what plugins rely on has changed:\n{found}\nIf that is meant, run  {public_names.COMMAND}  and say in "
        "plugins/README.md what plugin authors have to change; else keep the name and its signature"
    )


class Base(aegpo.Spec):
    """Not public itself."""

    kind: str

    def shared(self, count: int = 2) -> Iterator[str]:
        yield from "x" * count


class Public(Base):
    """A spec."""

    kind: Literal["public"] = "public"
    needs: ClassVar[bool] = True
    section: aegpo.PolicySpec = aegpo.PolicySpec(rank=4)
    required: int

    @property
    def label(self) -> str:
        return ""

    def _hidden(self) -> None: ...


@dataclass(frozen=True)
class Record:
    """A record."""

    first: int
    second: dict[str, int] = field(default_factory=dict)

    @cached_property
    def total(self) -> int:
        return self.first


def grown(record: Record, *, factor: float = 1.5) -> Record:
    return record


@pytest.mark.parametrize(
    ("value", "lines"),
    [
        (
            Public,
            [
                "class x(Spec)",
                "    kind: Literal['public'] = 'public'",
                "    needs: ClassVar[bool] = True",
                "    section: aegpo.PolicySpec = PolicySpec()",
                "    required: int",
                "    label -> str",
                "    def shared(self, count: int = 2) -> Iterator[str]",
            ],
        ),
        (Record, ["class x", "    first: int", "    second: dict[str, int] = ...", "    total -> int"]),
        (grown, ["def x(record: Record, *, factor: float = 1.5) -> Record"]),
        (("a", 2), ["x = ('a', 2)"]),
        (Literal["a", "b"], ["x = typing.Literal['a', 'b']"]),
    ],
)
def test_the_list_says_what_a_caller_sees(value, lines):
    assert list(public_names.described("x", value, {aegpo.Spec, Public, Record})) == lines


def test_a_subclass_of_a_public_class_says_only_what_is_its_own():
    class Narrow(Public):
        """One more field."""

        extra: int = 3

    assert list(public_names.described("x", Narrow, {aegpo.Spec, Public})) == ["class x(Public)", "    extra: int = 3"]


def test_a_changed_default_is_shown_as_a_difference():
    old = public_names.public_names()
    new = old.replace("    rank: int = 32\n", "    rank: int = 16\n")
    assert new != old
    shown = public_names.difference(old, new).splitlines()
    assert "-    rank: int = 32" in shown
    assert "+    rank: int = 16" in shown
    assert not public_names.difference(old, old)


@pytest.mark.parametrize("door", public_names.DOORS)
def test_a_door_opens_without_torch_and_other_large_libraries(door):
    late = {"torch", "diffusers", "peft", "scipy", "filelock", "jinja2", "requests", "urllib3"}
    code = f"import sys, {door}; sys.exit(', '.join(sorted({late!r} & set(sys.modules))) or 0)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{door} imports {done.stderr}"


@pytest.mark.parametrize("door", public_names.DOORS)
def test_a_door_lists_its_names_once_and_in_alphabetical_order(door):
    names = vars(sys.modules[door])["__all__"]
    assert names == sorted(set(names))
