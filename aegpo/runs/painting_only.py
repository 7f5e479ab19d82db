"""The experiment of a run for who only paints with its policy: without the parts of its method that are not installed.

What a policy paints depends on its model, its weights and how evaluations are painted. A reward or an allocator taught
it and is needed no more, so that a run can be sampled and exported where the plugin it was trained with is not there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aegpo.core.experiment_type import DEFAULTS
from aegpo.core.registries import Registries

_STAND_IN = {"kind": "palette"}  # for an experiment's rewards, of which it has at least one


def without_missing(data: Mapping[str, Any], registries: Registries) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The plain data of an experiment with default parts in place of those that are not registered.

    Rewards, trackers and sources of signals are left out. The model stays as it is, whether it is registered or not.

    Returns:
        The data; and what is missing, as in ``reward 'jpeg-size'``, each once.
    """
    missing: list[str] = []

    def known(axis: str, kind: object) -> bool:
        there = kind in registries.of(axis).names
        if not there:
            missing.append(f"{'source of signals' if axis == 'signals' else axis} {kind!r}")
        return there

    found = dict(data)
    for axis, default in DEFAULTS.items():
        if axis in found and not known(axis, _kind(found[axis])):
            found[axis] = {"kind": default}
    found["rewards"] = [each for each in data.get("rewards", ()) if known("reward", _kind(each))] or [_STAND_IN]
    found["trackers"] = [each for each in data.get("trackers", ()) if known("tracker", _kind(each))]
    found["signals"] = {kind: each for kind, each in data.get("signals", {}).items() if known("signals", kind)}
    evaluation = data.get("evaluation", {})
    scored = [each for each in evaluation.get("rewards", ()) if known("reward", _kind(each))]
    found["evaluation"] = {**evaluation, "rewards": scored}
    return found, tuple(dict.fromkeys(missing))


def _kind(part: object) -> object:
    return part.get("kind") if isinstance(part, Mapping) else part
