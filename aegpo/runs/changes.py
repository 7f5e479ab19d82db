"""What of a run's experiment is not as it was when the run was begun, and with which of it a run goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from aegpo.config.older import modern
from aegpo.config.validation import validate
from aegpo.core.experiment import Experiment
from aegpo.core.places import named_places
from aegpo.core.problems import Location
from aegpo.core.registry import Spec
from aegpo.runs.longer import STEPS, why_not_longer
from aegpo.runs.places import moved, same_place
from aegpo.runs.rules import without_words

_ABSENT = object()


@dataclass(frozen=True)
class Change:
    """A field of a run's experiment that is not what it was when the run was begun."""

    key: str
    old: str  # as JSON
    new: str
    by_default: bool = False  # the file does not set it: what changed is its default
    moved: bool = False  # a place, of something that was moved
    because: str = ""  # why a run cannot go on with it, where that is not plain

    def __str__(self) -> str:
        """``key: old -> new``; for a default also how to keep the old one."""
        line = f"{self.key}: {self.old} -> {self.new}" + (f" ({self.because})" if self.because else "")
        if not self.by_default:
            return line
        return f"{line} (the file does not set it, and its default is this now; to keep the old one, {self.way_back})"

    @property
    def way_back(self) -> str:
        """What to write into the file to keep the old value."""
        return f"write {self.key}: {self.old}"

    @property
    def is_micro_batch(self) -> bool:
        """True for what moves results by rounding only: how much is worked on at once, and how much is kept of it."""
        return self.key.endswith(".micro_batch") or self.key == "optimizer.retain"

    @property
    def is_parallel(self) -> bool:
        """True for how processes share the work: `aegpo.runs.cutting` says what moves results."""
        return self.key == "parallel" or self.key.startswith("parallel.")

    @property
    def is_tracker(self) -> bool:
        """True for who is told of a run: that changes nothing of it."""
        return self.key.partition("[")[0] == "trackers"

    @property
    def is_allowed(self) -> bool:
        """True for what a run may go on with, and say."""
        if self.key == STEPS and not (self.because or self.by_default):
            return True
        harmless = self.is_tracker or self.key == "model.gradient_checkpointing"
        return harmless or self.is_micro_batch or self.is_parallel or self.moved


def experiment_changes(experiment: Experiment, manifest: Mapping[str, Any]) -> list[Change]:
    """What of an experiment is not as in a manifest.

    A manifest of an earlier version lacks the fields that came since: they have the default of today, which is to mean
    what was done before there was a field.
    """
    data = modern(manifest["experiment"])
    begun, _ = validate(type(experiment), data)
    old, now = without_words(data) if begun is None else _plain(begun), _plain(experiment)
    named = {place.location for place in named_places(type(experiment), now)}
    return [
        _change(
            place,
            before,
            after,
            by_default=_ABSENT not in (before, after) and not _is_set(experiment, place),
            moved=place in named and moved(before, after),
            because=why_not_longer(before, experiment) if place == (STEPS,) else "",
        )
        for place, before, after in _pairs(old, now, ())
        if not (place in named and same_place(before, after, manifest)) and not _pins(place, after, manifest)
    ]


def differences(old: Any, new: Any) -> list[str]:
    """What differs between two JSON values, as lines ``key: old -> new`` in the order of the keys."""
    return [str(_change(*pair)) for pair in _pairs(old, new, ())]


def _pairs(old: Any, new: Any, place: Location) -> Iterator[tuple[Location, Any, Any]]:
    """Where two JSON values differ, and what is there in each."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in (*old, *(name for name in new if name not in old)):
            yield from _pairs(old.get(name, _ABSENT), new.get(name, _ABSENT), (*place, name))
    elif isinstance(old, list) and isinstance(new, list) and any(isinstance(item, dict) for item in (*old, *new)):
        for index in range(max(len(old), len(new))):
            before, after = (each[index] if index < len(each) else _ABSENT for each in (old, new))
            yield from _pairs(before, after, (*place, index))
    elif old != new or type(old) is not type(new):
        yield place, old, new


def _shown(value: Any) -> str:
    return "(absent)" if value is _ABSENT else json.dumps(value)


def _pins(place: Location, after: Any, manifest: Mapping[str, Any]) -> bool:
    """True if a change only says by its commit which base the run was trained from."""
    return place == ("model", "revision") and after == (manifest.get("base") or {}).get("commit", _ABSENT)


def _change(
    place: Location, old: Any, new: Any, *, by_default: bool = False, moved: bool = False, because: str = ""
) -> Change:
    key = "".join(f"[{name}]" if isinstance(name, int) else f".{name}" for name in place)
    return Change(key.removeprefix("."), _shown(old), _shown(new), by_default, moved, because)


def _plain(experiment: Experiment) -> Any:
    """What an experiment does, as JSON: options of signals that no part reads do nothing, nor do words about it."""
    experiment = experiment.model_copy(update={"signals": dict(experiment.sources)})
    return json.loads(json.dumps(without_words(experiment.model_dump(mode="json"))))


def _is_set(spec: Spec, place: Location) -> bool:
    """True if the file, or `--set`, gave the field at a place; False if it has its default."""
    value: Any = spec
    for name in place:
        if isinstance(value, Spec):
            if name not in value.model_fields_set:
                return False
            value = dict(value)[str(name)]
        elif isinstance(value, Mapping):
            value = value.get(name)
        elif isinstance(value, tuple) and isinstance(name, int) and name < len(value):
            value = value[name]
        else:
            break
    return True
