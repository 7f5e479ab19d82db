"""The type that experiment files are validated against: every part narrowed to what is registered."""

from __future__ import annotations

from collections.abc import Mapping
from types import GenericAlias
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, create_model

from aegpo.core.experiment import EvaluationSpec, Experiment
from aegpo.core.parts import SignalSpec
from aegpo.core.registries import Registries
from aegpo.core.registry import Entry
from aegpo.errors import PluginError

DEFAULTS = {  # GRPO, as Flow-GRPO has it: the parts an experiment has where its file names none
    "curriculum": "shuffle",
    "allocator": "uniform",
    "selector": "uniform",
    "tree": "independent",
    "sampler": "flow-sde",
    "advantage": "group",
    "objective": "clipped",
}


def experiment_type(registries: Registries) -> type[Experiment]:
    """`Experiment` with every part narrowed to what is registered: the type that files are validated against."""
    rewards: Any = GenericAlias(tuple, (registries.rewards.union(), ...))
    trackers: Any = GenericAlias(tuple, (registries.trackers.union(), ...))
    evaluation: Any = create_model(
        "EvaluationSpec",
        __base__=EvaluationSpec,
        __doc__=EvaluationSpec.__doc__,
        __module__=EvaluationSpec.__module__,
        rewards=(rewards, Field(default=())),
    )
    narrowed: Any = {
        "model": (registries.models.union(), ...),
        "rewards": (rewards, Field(min_length=1)),
        **{axis: _chosen(registries, axis) for axis in DEFAULTS},
        "signals": (_sources(registries), Experiment.model_fields["signals"]),
        "evaluation": (evaluation, evaluation()),
        "trackers": (trackers, Field(default=())),
    }
    experiment = create_model(
        "Experiment",
        __base__=Experiment,
        __doc__=Experiment.__doc__,
        __module__=Experiment.__module__,  # specs of one name are equal where their fields are
        **narrowed,
    )
    experiment.registered_signals = {entry.name: _default(entry) for entry in registries.signals}
    return experiment


def _default(source: Entry[SignalSpec]) -> SignalSpec:
    """A source whose options nobody gives.

    Raises:
        PluginError: if it cannot do without them.
    """
    asked = [repr(name) for name, field in source.spec.model_fields.items() if field.is_required()]
    if asked:
        raise PluginError(
            f"{source.source} registers signals {source.name!r} without a default for {', '.join(asked)}; parts ask "
            "for signals by name alone, so every option of a source needs one"
        )
    return source.spec.model_validate({"kind": source.name})


def _sources(registries: Registries) -> Any:
    """The type of the options of sources: the key of each is its kind."""
    options: Any = GenericAlias(dict, (str, registries.signals.union()))
    return Annotated[options, BeforeValidator(_named)]


def _named(sources: object) -> object:
    """`{name: {...}}` as `{name: {kind: name, ...}}`; anything else as it is."""
    if not isinstance(sources, Mapping):
        return sources
    return {
        kind: {"kind": kind, **options} if isinstance(options, Mapping) else options
        for kind, options in sources.items()
    }


def _chosen(registries: Registries, axis: str) -> tuple[Any, Any]:
    """The type of a part of the method, and its default where that is registered."""
    registry = registries.of(axis)
    kind = DEFAULTS[axis]
    return registry.union(), registry.get(kind)() if kind in registry.names else ...
