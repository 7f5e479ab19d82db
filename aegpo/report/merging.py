"""Runs of one experiment that are in several folders, as one; and what is told where they do not fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from aegpo.config.older import modern
from aegpo.core.verdicts import VerdictSpec
from aegpo.errors import AegpoError
from aegpo.report.recorded_run import RecordedRun
from aegpo.runs.changes import differences
from aegpo.runs.folders import Order
from aegpo.runs.rules import without_words

# What moves no number of a run, or by rounding only: where it ran, who watched it, how much was worked on at once.
_FREE = ("seed", "device", "trackers", "parallel", "checkpoint")
_FREE_INSIDE = ("micro_batch", "retain", "gradient_checkpointing")
_APART = "give the file that is right to 'aegpo run' with the --out of each, or report them apart"
_SHOWN = 6  # differences that an error names


def merged_order(orders: Mapping[Path, Order]) -> Order:
    """The arms and seeds of all folders in the order they are met, and all that any of them compares.

    Raises:
        AegpoError: if they ask for different margins, targets or controls.
    """
    if len(orders) == 1:
        return next(iter(orders.values()))
    arms = tuple(dict.fromkeys(arm for order in orders.values() for arm in order.arms))
    seeds = tuple(dict.fromkeys(seed for order in orders.values() for seed in order.seeds))
    about = {arm: words for order in reversed(list(orders.values())) for arm, words in order.about.items()}
    named = any(order.verdict.comparisons is not None for order in orders.values())
    pairs = dict.fromkeys(pair for order in orders.values() for pair in _named(order.verdict, order.arms))
    controls: dict[str, str] = {}
    for order in orders.values():
        controls |= order.verdict.controls or {}
    asked = {
        "comparisons": tuple(pairs) if named else None,
        "controls": controls or None,
        "margin": _agreed(orders, "margin"),
        "target": _agreed(orders, "target"),
    }
    verdict = VerdictSpec(**{name: value for name, value in asked.items() if value is not None})
    for folder, order in orders.items():
        for arm, control in (order.verdict.controls or {}).items():
            if controls[arm] != control:
                other = controls[arm]
                raise AegpoError(f"{folder}: the control of {arm} is {control!r}, elsewhere {other!r}; {_APART}")
    wrong = next(iter(verdict.problems(arms)), None)
    if wrong is not None:
        where = ".".join(map(str, wrong.location))
        raise AegpoError(f"what these folders compare does not fit together: {where}: {wrong.message}")
    return Order(arms, seeds, verdict, about)


def _named(verdict: VerdictSpec, arms: Sequence[str]) -> tuple[tuple[str, str], ...]:
    return verdict.model_copy(update={"controls": None}).pairs(arms)


def _agreed(orders: Mapping[Path, Order], name: str) -> float | None:
    values = {folder: dict(order.verdict)[name] for folder, order in orders.items()}
    first = next(iter(values))
    for folder, value in values.items():
        if value != values[first]:
            raise AegpoError(f"{name!r} is {values[first]} in {first} and {value} in {folder}; {_APART}")
    found: float | None = values[first]
    return found


def check_one_experiment(runs: Sequence[RecordedRun]) -> None:
    """Refuses runs of experiments with other names, and runs of one arm that are not of one experiment.

    Raises:
        AegpoError: with what differs.
    """
    firsts: dict[str, RecordedRun] = {}
    for run in runs:
        if run.experiment["name"] != runs[0].experiment["name"]:
            raise AegpoError(
                f"{runs[0].folder} is of experiment {runs[0].experiment['name']!r} and {run.folder} of "
                f"{run.experiment['name']!r}; a report is of one experiment: report them apart"
            )
        first = firsts.setdefault(run.arm, run)
        lines = list(_changes(first, run))
        if lines:
            shown = lines[:_SHOWN] + ([f"{len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else [])
            text = "\n".join(f"  {line}" for line in shown)
            raise AegpoError(
                f"arm {run.arm} is not the same in {first.folder} and {run.folder}:\n{text}\n"
                "run both with one file, or give one of the arms another name"
            )


def _changes(first: RecordedRun, run: RecordedRun) -> Iterator[str]:
    """What differs; a field that only one of two versions knows has its default in the other."""
    old, new = (_compared(modern(without_words(each.experiment))) for each in (first, run))
    yield from (line for line in differences(old, new) if "(absent)" not in line)


def _compared(experiment: Mapping[str, Any]) -> Any:
    return _plain({name: value for name, value in experiment.items() if name not in _FREE})


def _plain(value: Any) -> Any:
    """A value with the names of folders and files in place of their paths, which no two machines share."""
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items() if name not in _FREE_INSIDE}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value
