"""What was run of an experiment file, as the file itself says: `measured: never`, or when, where and by what command.

It is of the file, not of an arm or a run: a file that extends another does not inherit it, and no manifest has it, so
that it is not compared when a run goes on.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from typing import Annotated, Literal, TypeAlias

from pydantic import AfterValidator, BeforeValidator, Field

from aegpo.config.marks import Marked, Mistake, dotted
from aegpo.config.validation import Finding, validate
from aegpo.core.registry import Spec

DESCRIPTION = "what was run of this file, when, where and by what command; never: nothing was"


def _text(value: object) -> object:
    if isinstance(value, int | float) and not isinstance(value, bool):
        raise ValueError(f"must be text, not the number {value}; put a commit of digits alone in quotes")
    return value


def _day(given: str) -> str:
    try:
        day = datetime.date.fromisoformat(given).isoformat()
    except ValueError:
        day = None
    if day != given:
        raise ValueError(f"must be a day such as 2026-01-31, not {given!r}")
    return given


def _words(given: str) -> str:
    if not given.strip():
        raise ValueError("must say something, not nothing")
    return given


Words: TypeAlias = Annotated[str, AfterValidator(_words)]


class MeasuredSpec(Spec):
    """A measurement of a file: what ran, when, on what, and where its numbers are."""

    commit: Annotated[str, BeforeValidator(_text)] = Field(
        pattern=r"^([0-9a-f]{7,40}|unknown)$",
        description="of the code that ran, else the one that recorded the numbers: 7 to 40 digits; or unknown",
    )
    date: Annotated[str, AfterValidator(_day)] = Field(description="of the measurement, as in 2026-01-31")
    machine: Words = Field(description="it ran on, and the libraries that matter")
    command: Words = Field(description="with which it ran")
    numbers: Words = Field(description="where they are: a file of the repository, or an address")
    deviates: Words | None = Field(
        default=None, description="in what it was not run as the file stands; null: in nothing"
    )

    def __str__(self) -> str:
        """One line, as in ``2026-01-31 at 01234567, 2 cores: aegpo run x.yaml (numbers: README.md)``."""
        deviates = "" if self.deviates is None else f"; deviates: {self.deviates}"
        return f"{self.date} at {self.commit}, {self.machine}: {self.command} (numbers: {self.numbers}{deviates})"


def read_measured(document: Marked, mistakes: list[Mistake]) -> MeasuredSpec | Literal["never"] | None:
    """What a file says of itself; None if it says nothing, or what it says is among the mistakes."""
    given = document.children.get("measured")
    if given is None:
        return None
    if given.value == "never":
        return "never"
    measured = None
    if isinstance(given.value, Mapping):
        measured, findings = validate(MeasuredSpec, given.plain)
    else:
        what = "must be 'never', or a mapping with 'commit', 'date', 'machine', 'command' and 'numbers'"
        findings = [Finding((), what)]
    for finding in findings:
        node, written = given.find(finding.location)
        mark = node.mark if written and not finding.at_key else node.key
        mistakes.append(Mistake(mark, dotted(("measured", *finding.location)), finding.message))
    return measured
