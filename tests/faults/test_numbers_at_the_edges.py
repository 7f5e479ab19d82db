"""Every number of a spec at its least and its greatest value: it works, or one line says why not here.

rgthree/rgthree-comfy 90, pytorch/torchtitan 746, and numbers at the limits of schedules.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Any, get_args, get_origin

import pytest
from annotated_types import Ge, Gt, Le, Lt

from aegpo.core.experiment import EvaluationSpec, Experiment
from aegpo.core.rates import ScheduleSpec
from aegpo.core.sections import CheckpointSpec, OptimizerSpec, PolicySpec, PromptsSpec, RolloutsSpec
from aegpo.plugin.manager import load_registries, plugin_manager

SECTIONS = {
    "prompts": PromptsSpec,
    "rollouts": RolloutsSpec,
    "policy": PolicySpec,
    "optimizer": OptimizerSpec,
    "optimizer.schedule": ScheduleSpec,
    "evaluation": EvaluationSpec,
    "checkpoint": CheckpointSpec,
    "": Experiment,
}
LISTS = ("rewards", "trackers")
GIVEN = {"url": "http://127.0.0.1:9", "model": "m"}  # to fields without a default
SIGNALS = {"allocators": "entropy-delta", "selectors": "entropy"}
OF_OTHERS = {  # settings without which a field is not read, or its value does not fit
    "signals.entropy": {"allocator": {"kind": "entropy", "low": 2, "high": 6}},
    "policy": {"policy": {"train": "lora"}},
    "allocators.": {"allocator": {"low": 2, "high": 6}},
    "objectives.awm": {"objective": {"weight": "ghuber"}},
}
FOR_LONG = 5_000  # beyond it, a number of steps, rollouts or images is only checked


def bounds_of(annotation: Any, metadata: list[Any]) -> Iterator[tuple[type, float, float]]:
    """The type of a number with the least and greatest value it may have."""
    if get_origin(annotation) is Annotated:
        inner, *more = get_args(annotation)
        unpacked = [each for one in more for each in getattr(one, "metadata", [one])]
        yield from bounds_of(inner, [*metadata, *unpacked])
    elif annotation in (int, float):
        low = high = None
        for bound in metadata:
            if isinstance(bound, Ge | Gt):
                low = bound.ge if isinstance(bound, Ge) else above(annotation, bound.gt)
            if isinstance(bound, Le | Lt):
                high = bound.le if isinstance(bound, Le) else -above(annotation, -bound.lt)
        if low is not None and high is not None:
            yield annotation, annotation(low), annotation(high)
    elif get_origin(annotation) is not tuple:
        for part in get_args(annotation):
            yield from bounds_of(part, metadata)


def above(kind: type, value: float) -> float:
    """The next number."""
    return value + 1 if kind is int else math.nextafter(value, math.inf)


def edges() -> Iterator[Any]:
    """(place, field, value) of each number that has bounds, twice."""
    parts = {
        f"{registry.axis}.{entry.name}": entry.spec
        for registry in load_registries(plugin_manager())
        for entry in registry
        if entry.source == "aegpo"
    }
    for place, spec in (SECTIONS | parts).items():
        for name, field in spec.model_fields.items():
            for _, low, high in list(bounds_of(field.annotation, field.metadata))[:1]:
                for value in (low, high):
                    yield pytest.param(place, name, value, id=f"{place}.{name}={value}".lstrip("."))


def changed(tiny: dict[str, Any], place: str, name: str, value: float) -> dict[str, Any]:
    """The tiny experiment with one number, in a part of its kind."""
    spec = tiny | {"training_steps": 2}
    for prefix, more in OF_OTHERS.items():
        if place.startswith(prefix):
            spec |= {key: (spec[key] if isinstance(spec.get(key), dict) else {}) | each for key, each in more.items()}
    if place == "":
        return spec | ({"seeds": [value]} if name == "seed" else {name: value})
    if "." not in place:
        return spec | {place: spec.get(place, {}) | {name: value}}
    axis, kind = place.split(".")
    if axis == "optimizer":
        return spec | {axis: {kind: {"kind": "cosine", name: value}}}
    part = {"kind": kind, name: value}
    if axis in LISTS:
        return spec | {axis: [GIVEN | part if kind in ("remote", "vlm-judge", "vlm-preference") else part]}
    if axis == "signals":
        return spec | {axis: {kind: part}}
    if kind in ("median-split", "peaks"):
        part |= {"signal": SIGNALS[axis]}
    key = {"curricula": "curriculum"}.get(axis, axis.removesuffix("s"))
    before = spec[key] if axis == "allocators" or place == "objectives.awm" else {}
    if axis == "objectives":
        spec |= {"sampler": {"kind": "flow-sde"}}
    return spec | {key: (before if "low" in before or "weight" in before else {}) | part}


def refused_or(ended, *codes):
    assert not ended.hangs
    assert not ended.traceback, ended.out
    assert ended.code in codes, ended.out
    if ended.code == 2:
        assert sum(line.startswith("error:") for line in ended.out.splitlines()) == 1, ended.out


@pytest.mark.parametrize(("place", "name", "value"), list(edges()))
def test_a_number_at_its_edge_works_or_is_refused_in_words(warm, tiny, write_experiment, tmp_path, place, name, value):
    spec = changed(tiny, place, name, value)
    path = write_experiment(**spec)
    checked = warm(["check", path], tmp_path, memory=16e9)
    refused_or(checked, 0, 2)
    asks_others = place.split(".")[0] == "models" or (place.startswith("rewards.") and place != "rewards.scene")
    if checked.code == 0 and not asks_others and not (value > FOR_LONG and isinstance(value, int) and name != "seed"):
        refused_or(warm(["run", path, "--out", "out", "--no-report"], tmp_path, seconds=120, memory=16e9), 0, 2)
