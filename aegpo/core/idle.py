"""Settings that were given and have no effect under the others, which `check` warns of."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from aegpo.core.parts import RewardSpec, SignalSpec
from aegpo.core.problems import Location, Problem
from aegpo.core.registry import Spec, Where
from aegpo.core.sections import DatasetPrompts, PromptsSpec


def idle(
    experiment: Spec, sources: Iterable[SignalSpec], scored: Sequence[RewardSpec], prompts: PromptsSpec
) -> Iterator[Problem]:
    """A warning for each setting of an experiment; what was given as it would be anyway gets none.

    Args:
        experiment: with all that is in it.
        sources: of signals, those that no part reads.
        scored: the rewards that only evaluations have.
        prompts: where these come from.
    """
    yield from _unread(experiment, ())
    for source in sources:
        if any(given(source, name) for name in type(source).model_fields):
            message = f"has no effect: no part reads {' or '.join(source.provides)}; remove it, or choose one that does"
            yield Problem(("signals", source.kind), message, warning=True)
    for index, reward in enumerate(scored):
        if given(reward, "weight"):
            message = "has no effect: what only evaluations score is never trained on; remove it"
            yield Problem(("evaluation", "rewards", index, "weight"), message, warning=True)
    if prompts.file is not None and given(prompts, "shared"):
        message = "has no effect: of a 'file' no prompt is in both lists; remove it"
        yield Problem(("prompts", "shared"), message, warning=True)
    if None not in (prompts.train, prompts.evaluation) and given(prompts, "seed"):
        message = "has no effect: it draws captions of the model's, and both lists are files or datasets; remove it"
        yield Problem(("prompts", "seed"), message, warning=True)
    for name, place in (("train", prompts.train), ("evaluation", prompts.evaluation)):
        if isinstance(place, DatasetPrompts) and place.revision is not None and Path(place.dataset).is_dir():
            message = f"has no effect: {place.dataset!r} is a folder, which has no revisions; remove it"
            yield Problem(("prompts", name, "revision"), message, warning=True)


def given(spec: Spec, name: str) -> bool:
    """Whether a field has another value than where nobody gives one."""
    return bool(dict(spec)[name] != type(spec).model_fields[name].get_default(call_default_factory=True))


def _unread(value: object, place: Location) -> Iterator[Problem]:
    """What specs themselves say of their fields, wherever in an experiment they are."""
    if isinstance(value, Spec):
        for name, where in value.read_where.items():
            if given(value, name) and not _is_read(value, where):
                yield Problem((*place, name), _message(value, where), warning=True)
    for key, item in _inside(value):
        yield from _unread(item, (*place, key))


def _inside(value: object) -> Iterable[tuple[str | int, object]]:
    if isinstance(value, Spec):
        return value  # its fields
    if isinstance(value, Mapping):
        return value.items()
    return enumerate(value) if isinstance(value, tuple) else ()


def _is_read(spec: Spec, where: Where) -> bool:
    return (dict(spec)[where.field] in where.values) != where.other


def _message(spec: Spec, where: Where) -> str:
    values = " or ".join(_as_yaml(value) for value in where.values)
    right = f"other than {values}" if where.other else values
    now = dict(spec)[where.field]
    return f"has no effect under '{where.field}: {_as_yaml(now)}'; remove it, or choose '{where.field}' {right}"


def _as_yaml(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
