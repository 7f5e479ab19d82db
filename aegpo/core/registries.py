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
from aegpo.core.registry import Registry, Spec

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
        plural = "curricula" if axis == "curriculum" else f"{axis}s"
        return next(registry for registry in self if registry.axis == plural)

    def __iter__(self) -> Iterator[Registry[Any]]:
        return (getattr(self, axis) for axis in PART_AXES)
