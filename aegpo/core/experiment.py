"""The spec of an experiment: its sections, and what holds across them.

Nothing here imports torch: `aegpo check`, `plugins`, `schema` and `--help` answer at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from types import GenericAlias
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, SerializeAsAny, create_model

from aegpo.core.parts import (
    AdvantageSpec,
    AllocatorSpec,
    ModelSpec,
    ObjectiveSpec,
    PartSpec,
    Registries,
    RewardSpec,
    SamplerSpec,
    SelectorSpec,
    TrackerSpec,
    TreeSpec,
)
from aegpo.core.problems import Location, Problem
from aegpo.core.records import FloatArray, StepTable
from aegpo.core.registry import Spec
from aegpo.core.sections import (
    CheckpointSpec,
    OptimizerSpec,
    PolicySpec,
    Positive,
    ProbeSpec,
    PromptsSpec,
    RolloutsSpec,
)


class EvaluationSpec(Spec):
    """Held-out prompts under the deterministic sampler, for the policy and the untouched base."""

    every: Positive = Field(
        default=10, description="training steps between evaluations; the first and last step always count"
    )
    denoising_steps: Annotated[int, Field(ge=2)] | None = Field(default=None, description="null: as in training")
    height: Positive | None = Field(default=None, description="of evaluation images, in pixels; null: as in training")
    width: Positive | None = Field(default=None, description="of evaluation images, in pixels; null: as in training")
    images: Positive = Field(default=16, description="prompts whose images are kept as a grid at every evaluation")
    seed: int = Field(default=0, description="start noise, one fixed noise for each prompt")
    rewards: tuple[SerializeAsAny[RewardSpec], ...] = Field(default=(), description="scored too, but never trained on")


class Experiment(Spec):
    """One arm under one seed, resolved: everything a run needs to know."""

    name: str = Field(
        default="experiment", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="folder of the run under --out"
    )
    training_steps: Positive = Field(default=40, description="rounds of rollouts and learning")
    seed: int = Field(default=0, ge=0, lt=2**63, description="of every random decision; set by `seeds` of the file")
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto: a GPU if there is one")
    precision: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32", description="autocast of the network"
    )
    model: SerializeAsAny[ModelSpec]
    prompts: PromptsSpec = PromptsSpec()
    rollouts: RolloutsSpec = RolloutsSpec()
    rewards: tuple[SerializeAsAny[RewardSpec], ...] = Field(min_length=1)
    allocator: SerializeAsAny[AllocatorSpec]
    selector: SerializeAsAny[SelectorSpec]
    tree: SerializeAsAny[TreeSpec]
    sampler: SerializeAsAny[SamplerSpec]
    advantage: SerializeAsAny[AdvantageSpec]
    objective: SerializeAsAny[ObjectiveSpec]
    policy: PolicySpec = PolicySpec()
    optimizer: OptimizerSpec = OptimizerSpec()
    probe: ProbeSpec = ProbeSpec()
    evaluation: EvaluationSpec = EvaluationSpec()
    checkpoint: CheckpointSpec = CheckpointSpec()
    trackers: tuple[SerializeAsAny[TrackerSpec], ...] = Field(default=())

    @property
    def needs_entropy(self) -> bool:
        """True if a chosen part reads attention entropy, so that the probe runs."""
        return self.allocator.needs_entropy or self.selector.needs_entropy

    def algorithm(self) -> Mapping[str, PartSpec]:
        """The parts that make up the method, by field."""
        return {
            "allocator": self.allocator,
            "selector": self.selector,
            "tree": self.tree,
            "sampler": self.sampler,
            "advantage": self.advantage,
            "objective": self.objective,
        }

    @cached_property
    def sigmas(self) -> FloatArray:  # (T+1,)
        """The noise levels of training."""
        return np.asarray(self.model.sigmas(self.rollouts.denoising_steps), dtype=np.float64)

    @cached_property
    def step_table(self) -> StepTable:
        """The coefficients of the sampler's steps in training."""
        return self.sampler.table(self.sigmas)

    @property
    def updates(self) -> int:
        """Optimizer updates of the whole run, at most."""
        return self.training_steps * self.optimizer.updates(self.rollouts.rollouts_per_step)

    def problems(self) -> Iterator[Problem]:
        """What several fields together get wrong; `aegpo.config.loading` reports it with the line of the field."""
        yield from self._wrong_counts()
        yield from self.optimizer.problems(self.updates)
        if (self.evaluation.height is None) != (self.evaluation.width is None):
            yield Problem(("evaluation",), "'height' and 'width' are given together, or neither is")
        for split, path in (("train", self.prompts.train), ("evaluation", self.prompts.evaluation)):
            if path is None and not self.model.has_captions:
                yield Problem(("prompts",), f"model {self.model.kind!r} brings no captions: name a file as {split!r}")
        yield from self._same_names()
        if self.needs_entropy:
            yield from self._wrong_probe()
        for field, part in {"model": self.model, **self.algorithm()}.items():
            yield from (Problem((field,), message) for message in part.problems(self))
            yield from (Problem((field,), message, warning=True) for message in part.cautions(self))

    def _wrong_counts(self) -> Iterator[Problem]:
        rollouts, chunk = self.rollouts, self.optimizer.rollouts_per_update
        if rollouts.rollouts_per_step < 2 * rollouts.prompts_per_step:
            least = 2 * rollouts.prompts_per_step
            yield Problem(
                ("rollouts", "rollouts_per_step"),
                f"a group needs 2 rollouts to be compared: {rollouts.prompts_per_step} prompts need at least {least}",
            )
        if chunk is not None and rollouts.rollouts_per_step % chunk:
            valid = _nearest_divisors(rollouts.rollouts_per_step, chunk)
            yield Problem(
                ("optimizer", "rollouts_per_update"),
                f"{chunk} does not divide the step's {rollouts.rollouts_per_step} rollouts; nearest that do: {valid}",
            )

    def _same_names(self) -> Iterator[Problem]:
        """Rewards and trackers that nothing tells apart."""
        places: list[tuple[Location, RewardSpec]] = [(("rewards", i), spec) for i, spec in enumerate(self.rewards)]
        places += [(("evaluation", "rewards", i), spec) for i, spec in enumerate(self.evaluation.rewards)]
        labels = set[str]()
        for place, spec in places:
            if spec.label in labels:
                yield Problem(place, f"two rewards are called {spec.label!r}; give one a 'name' of its own")
            labels.add(spec.label)
        for index, tracker in enumerate(self.trackers):
            if tracker in self.trackers[:index]:
                message = f"two trackers are {tracker.kind!r} with the same settings; name it once"
                yield Problem(("trackers", index), message)

    def _wrong_probe(self) -> Iterator[Problem]:
        """A block the model lacks, steps that a trajectory does not have, and a trunk of another policy."""
        blocks, objective = self.model.attention_blocks, self.objective
        if blocks is not None and self.probe.block not in blocks:
            message = f"model {self.model.kind!r} has no {self.probe.block!r} attention; it has {', '.join(blocks)}"
            yield Problem(("probe", "block"), message)
        for message in self.probe.wrong_steps(self.rollouts.denoising_steps):
            yield Problem(("probe", "steps"), message)
        if self.probe.source == "rollout" and objective.keeps_old:
            message = (
                f"objective {objective.kind!r} samples rollouts by an older policy than the one that is probed, so "
                "they cannot take over its evaluations; use 'probe'"
            )
            yield Problem(("probe", "source"), message)


def _nearest_divisors(total: int, wrong: int) -> str:
    divisors = [value for value in range(1, total + 1) if total % value == 0]
    below = max((value for value in divisors if value < wrong), default=None)
    above = min((value for value in divisors if value > wrong), default=None)
    return " and ".join(str(value) for value in (below, above) if value is not None)


DEFAULTS = {  # GRPO, as Flow-GRPO has it: the parts an experiment has where its file names none
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
        "EvaluationSpec", __base__=EvaluationSpec, __doc__=EvaluationSpec.__doc__, rewards=(rewards, Field(default=()))
    )
    narrowed: Any = {
        "model": (registries.models.union(), ...),
        "rewards": (rewards, Field(min_length=1)),
        **{axis: _chosen(registries, axis) for axis in DEFAULTS},
        "evaluation": (evaluation, evaluation()),
        "trackers": (trackers, Field(default=())),
    }
    return create_model("Experiment", __base__=Experiment, __doc__=Experiment.__doc__, **narrowed)


def _chosen(registries: Registries, axis: str) -> tuple[Any, Any]:
    """The type of a part of the method, and its default where that is registered."""
    registry = registries.of(axis)
    kind = DEFAULTS[axis]
    return registry.union(), registry.get(kind)() if kind in registry.names else ...
