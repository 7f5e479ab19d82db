"""One registry for each kind of part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from aegpo.core.parts import (
    AdvantageSpec,
    AllocatorSpec,
    CurriculumSpec,
    ModelSpec,
    ObjectiveSpec,
    RewardSpec,
    SamplerSpec,
    SelectorSpec,
    SignalSpec,
    TrackerSpec,
    TreeSpec,
)
from aegpo.core.registry import Registry, Spec, shipper
from aegpo.errors import AegpoError

PART_AXES: Mapping[str, type[Spec]] = {
    "models": ModelSpec,
    "rewards": RewardSpec,
    "curricula": CurriculumSpec,
    "signals": SignalSpec,
    "allocators": AllocatorSpec,
    "selectors": SelectorSpec,
    "trees": TreeSpec,
    "samplers": SamplerSpec,
    "advantages": AdvantageSpec,
    "objectives": ObjectiveSpec,
    "trackers": TrackerSpec,
}


@dataclass(frozen=True)
class Registries:
    """One registry for each kind of part; made by `aegpo.plugin.manager.load_registries`."""

    models: Registry[ModelSpec]
    rewards: Registry[RewardSpec]
    curricula: Registry[CurriculumSpec]
    signals: Registry[SignalSpec]
    allocators: Registry[AllocatorSpec]
    selectors: Registry[SelectorSpec]
    trees: Registry[TreeSpec]
    samplers: Registry[SamplerSpec]
    advantages: Registry[AdvantageSpec]
    objectives: Registry[ObjectiveSpec]
    trackers: Registry[TrackerSpec]

    @classmethod
    def empty(cls) -> Registries:
        """Eleven registries with nothing in them."""
        registries: dict[str, Any] = {axis: Registry(axis, base) for axis, base in PART_AXES.items()}
        return cls(**registries)

    def of(self, axis: str) -> Registry[Any]:
        """The registry that an experiment's key such as `allocator` chooses from."""
        return next(registry for registry in self if registry.axis == _plural(axis))

    def __iter__(self) -> Iterator[Registry[Any]]:
        return (getattr(self, axis) for axis in PART_AXES)


def with_shipper(error: AegpoError, words: str) -> str:
    """The words of an error, with who ships the part that it blames, if that is a plugin."""
    base = None if error.part is None else PART_AXES.get(_plural(error.part[0]))
    source = None if base is None or error.part is None else shipper(base, error.part[1])
    what, *rest = words.split("\n")
    return "\n".join([what if source is None else f"{what} (shipped by {source})", *rest])


def _plural(part: str) -> str:
    return {"curriculum": "curricula", "signals": "signals"}.get(part, f"{part}s")
