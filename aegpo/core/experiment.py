"""The spec of an experiment: its sections, and what holds across them.

Nothing here imports torch: `aegpo check`, `plugins`, `schema` and `--help` answer at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property, partial
from typing import Annotated, ClassVar, Literal, Self, get_args

import numpy as np
from pydantic import Field, SerializeAsAny, model_validator

from aegpo.core import contracts, promises
from aegpo.core.idle import idle
from aegpo.core.media import why_unread
from aegpo.core.parts import (
    AdvantageSpec,
    AllocatorSpec,
    CurriculumSpec,
    ModelSpec,
    ObjectiveSpec,
    PartSpec,
    RewardSpec,
    SamplerSpec,
    SelectorSpec,
    SignalSpec,
    TrackerSpec,
    TreeSpec,
)
from aegpo.core.phases import sharding_problems
from aegpo.core.problems import Location, Problem
from aegpo.core.records import FloatArray, StepTable
from aegpo.core.registry import LONGEST_NAME, Spec, suggestion
from aegpo.core.sections import (
    GIB,
    CheckpointSpec,
    OptimizerSpec,
    ParallelSpec,
    PolicySpec,
    Positive,
    PromptsSpec,
    RolloutsSpec,
    Seed,
    Sentence,
    Split,
)
from aegpo.errors import ContractError


class EvaluationSpec(Spec):
    """Held-out prompts under the deterministic sampler, for the policy and the untouched base."""

    every: Positive = Field(
        default=10, description="training steps between evaluations; the first and last step always count"
    )
    denoising_steps: Annotated[int, Field(ge=2, le=1000)] | None = Field(
        default=None, description="null: as in training"
    )
    height: Positive | None = Field(default=None, description="of evaluation images, in pixels; null: as in training")
    width: Positive | None = Field(default=None, description="of evaluation images, in pixels; null: as in training")
    images_per_prompt: Positive = Field(
        default=1, description="each from a start noise of its own; a prompt's score is the mean over them"
    )
    images: Positive = Field(
        default=16, description="prompts whose (first) images are kept as a grid at every evaluation"
    )
    seed: Seed = Field(default=0, description="start noise, one fixed noise for each image of each prompt")
    rewards: tuple[SerializeAsAny[RewardSpec], ...] = Field(default=(), description="scored too, but never trained on")


class Experiment(Spec):
    """One arm under one seed, resolved: everything a run needs to know."""

    name: str = Field(
        default="experiment",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        max_length=LONGEST_NAME,
        description="folder of the run under --out",
    )
    about: Sentence | None = Field(
        default=None,
        description="one sentence on what the arm does, for readers of tables and the report; no number depends on it",
    )
    training_steps: Positive = Field(default=40, description="rounds of rollouts and learning")
    seed: Seed = Field(default=0, description="of every random decision; set by `seeds` of the file")
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto: a GPU if there is one")
    precision: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32", description="autocast of the network"
    )
    tf32: bool | None = Field(
        default=None,
        description="GPUs may make products of float32 of 19 bits (TF32), which are several times as fast; null: where "
        "`precision` is bfloat16, and not otherwise",
    )
    model: SerializeAsAny[ModelSpec]
    prompts: PromptsSpec = PromptsSpec()
    rollouts: RolloutsSpec = RolloutsSpec()
    rewards: tuple[SerializeAsAny[RewardSpec], ...] = Field(min_length=1)
    curriculum: SerializeAsAny[CurriculumSpec]
    allocator: SerializeAsAny[AllocatorSpec]
    selector: SerializeAsAny[SelectorSpec]
    tree: SerializeAsAny[TreeSpec]
    sampler: SerializeAsAny[SamplerSpec]
    advantage: SerializeAsAny[AdvantageSpec]
    objective: SerializeAsAny[ObjectiveSpec]
    policy: PolicySpec = PolicySpec()
    optimizer: OptimizerSpec = OptimizerSpec()
    parallel: ParallelSpec = ParallelSpec()
    signals: Mapping[str, SerializeAsAny[SignalSpec]] = Field(
        default={}, description="options of the sources of signals, by their kind; those that no part reads are idle"
    )
    evaluation: EvaluationSpec = EvaluationSpec()
    checkpoint: CheckpointSpec = CheckpointSpec()
    trackers: tuple[SerializeAsAny[TrackerSpec], ...] = Field(default=())

    registered_signals: ClassVar[Mapping[str, SignalSpec]] = {}  # every source that is registered, with its defaults

    @model_validator(mode="after")
    def _complete_signals(self) -> Self:
        """Sources that are read have their options among the fields, as manifests need them."""
        self.__dict__["signals"] = {**self.signals, **self.sources}
        return self

    def __hash__(self) -> int:
        """Of all fields; a mapping of sources has no hash of its own."""
        fields = {**{name: self.__dict__[name] for name in type(self).model_fields}, "signals": None}
        return hash((*fields.values(), *sorted((kind, hash(source)) for kind, source in self.signals.items())))

    @cached_property
    def reads(self) -> Mapping[str, tuple[str, ...]]:
        """The signals that each part of the method reads, by field; parts that read none are left out."""
        found = dict[str, tuple[str, ...]]()
        for field, part in self._readers().items():
            with contracts.blaming(field, part.kind):
                if isinstance(reads := part.reads, str):
                    raise ContractError(f"'reads' is the text {reads!r}; a tuple of names is asked: write ({reads!r},)")
                found[field] = tuple(reads)
        return {field: names for field, names in found.items() if names}

    def _readers(self) -> Mapping[str, CurriculumSpec | AllocatorSpec | SelectorSpec]:
        return {"curriculum": self.curriculum, "allocator": self.allocator, "selector": self.selector}

    def source(self, signal: str) -> SignalSpec | None:
        """The source that provides a signal; None: there is none."""
        every = {**self.registered_signals, **self.signals}
        return next((source for source in every.values() if signal in source.provides), None)

    @property
    def sources(self) -> Mapping[str, SignalSpec]:
        """The sources that are measured, by kind: those that provide what a chosen part reads."""
        names = dict.fromkeys(name for read in self.reads.values() for name in read)
        found = [source for name in names if (source := self.source(name)) is not None]
        return {source.kind: source for source in found}

    def algorithm(self) -> Mapping[str, PartSpec]:
        """The parts that make up the method, by field."""
        return {
            "curriculum": self.curriculum,
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
        steps = self.rollouts.denoising_steps
        with contracts.blaming("model", self.model.kind):
            levels = np.asarray(self.model.sigmas(steps))
            promises.check_levels(self.model.kind, levels, steps)
        return levels.astype(np.float64)

    @cached_property
    def step_table(self) -> StepTable:
        """The coefficients of the sampler's steps in training."""
        sigmas = self.sigmas
        with contracts.blaming("sampler", self.sampler.kind):
            table = self.sampler.table(sigmas)
            promises.check_table(self.sampler.kind, table, len(sigmas) - 1)
        return table

    @property
    def updates(self) -> int:
        """Optimizer updates of the whole run, at most."""
        return self.training_steps * self.optimizer.updates(self.rollouts.rollouts_per_step)

    @property
    def largest_batch(self) -> int:
        """Edges that a forward-backward takes at most; of groups, what they have where prompts have equal counts."""
        group = math.ceil(self.rollouts.rollouts_per_step / self.rollouts.prompts_per_step)
        return max(self.optimizer.states_at_once, group if self.objective.scope == "groups" else 1)

    @property
    def retained_bytes(self) -> int | None:
        """Of graphs that sampling keeps for the first optimizer step, at most; None: half of what is free then.

        Of sharded weights none are kept: each graph would hold what was gathered for it.
        """
        retain = self.optimizer.retain
        if not self.optimizer.retains(self.objective) or retain == "never" or self.parallel.weights == "sharded":
            return 0
        return None if retain == "auto" else int(retain * GIB)

    def problems(self) -> Iterator[Problem]:
        """What several fields together get wrong; `aegpo.config.loading` reports it with the line of the field."""
        yield from self._wrong_counts()
        yield from self._wrong_groups()
        yield from self.optimizer.problems(self.updates)
        yield from sharding_problems(self.parallel, self.optimizer, self.precision)
        if (self.evaluation.height is None) != (self.evaluation.width is None):
            yield Problem(("evaluation",), "'height' and 'width' are given together, or neither is")
        for split in get_args(Split):
            if self.prompts.source(split) is None and not self.model.has_captions:
                yield Problem(("prompts",), f"model {self.model.kind!r} brings no captions: name a file as {split!r}")
        yield from self._same_names()
        yield from self._wrong_media()
        yield from self._lone_images()
        yield from self._wrong_signals()
        unread = [source for kind, source in self.signals.items() if kind not in self.sources]
        yield from idle(self, unread, self.evaluation.rewards, self.prompts)
        for field, part in {"model": self.model, **self.algorithm()}.items():
            for verb, warning in ((part.problems, False), (part.cautions, True)):
                found = promises.said(field, part.kind, partial(verb, self))
                yield from (Problem((field,), message, warning) for message in found)

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

    def _wrong_groups(self) -> Iterator[Problem]:
        """Groups that are cut apart or need more memory than it seems, and prompts that cannot be dealt out."""
        rollouts, optimizer, objective = self.rollouts, self.optimizer, self.objective
        total, prompts = rollouts.rollouts_per_step, rollouts.prompts_per_step
        steps = math.ceil(total / (optimizer.rollouts_per_update or total))
        if objective.scope == "groups" and steps > 1 and optimizer.deal == "rollouts":
            message = (
                f"objective {objective.kind!r} compares the rollouts of a prompt, which 'rollouts' deals to {steps} "
                "optimizer steps; write 'deal: prompts', or leave 'rollouts_per_update' out"
            )
            yield Problem(("optimizer", "deal"), message)
        if optimizer.deal == "prompts" and steps > prompts:
            least = min(size for size in range(1, total + 1) if total % size == 0 and total // size <= prompts)
            message = (
                f"{optimizer.rollouts_per_update} makes {steps} optimizer steps, but only {prompts} prompts are dealt "
                f"to them; the least that leaves none without: {least}"
            )
            yield Problem(("optimizer", "rollouts_per_update"), message)
        if optimizer.deal == "prompts" and steps == 1:
            message = "has no effect: all prompts make one optimizer step; remove it, or name 'rollouts_per_update'"
            yield Problem(("optimizer", "deal"), message, warning=True)
        if self.largest_batch > optimizer.states_at_once:
            message = (
                f"{optimizer.states_at_once} is less than the {self.largest_batch} rollouts of a prompt, on average, "
                f"which objective {objective.kind!r} compares at each denoising step and so takes together all the same"
            )
            yield Problem(("optimizer", "micro_batch"), message, warning=True)

    def _same_names(self) -> Iterator[Problem]:
        """Rewards and trackers that nothing tells apart."""
        labels = set[str]()
        for place, spec in self._placed_rewards():
            if spec.label in labels:
                yield Problem(place, f"two rewards are called {spec.label!r}; give one a 'name' of its own")
            labels.add(spec.label)
        for index, tracker in enumerate(self.trackers):
            if tracker in self.trackers[:index]:
                message = f"two trackers are {tracker.kind!r} with the same settings; name it once"
                yield Problem(("trackers", index), message)

    def _wrong_media(self) -> Iterator[Problem]:
        """Rewards that cannot read what the model paints."""
        for place, spec in self._placed_rewards():
            wrong = why_unread(spec, self.model)
            if wrong is not None:
                yield Problem(place if spec.frames is None else (*place, "frames"), wrong)

    def _lone_images(self) -> Iterator[Problem]:
        """Rewards that compare a held-out prompt's images with one another where there is only one."""
        for place, spec in self._placed_rewards():
            if spec.group_wise and spec.compared_with == "own" and self.evaluation.images_per_prompt < 2:
                message = (
                    f"reward {spec.label!r} compares the images of a prompt with one another, but evaluation paints "
                    "one of each; write 'images_per_prompt: 2' or more under 'evaluation'"
                )
                yield Problem(place, message)

    def _placed_rewards(self) -> Iterator[tuple[Location, RewardSpec]]:
        """Those that are trained on, then those that are not, with their places in the experiment."""
        yield from ((("rewards", index), spec) for index, spec in enumerate(self.rewards))
        yield from ((("evaluation", "rewards", index), spec) for index, spec in enumerate(self.evaluation.rewards))

    def _wrong_signals(self) -> Iterator[Problem]:
        """Signals that nobody provides, and what is wrong with the sources of those that are read."""
        for field, names in self.reads.items():
            for name in names:
                if (source := self.source(name)) is None:
                    known = {signal for source in self.registered_signals.values() for signal in source.provides}
                    message = f"reads the signal {name!r}, which no source provides; {suggestion(name, known)}"
                    yield Problem((field,), message)
                elif field == "curriculum" and not source.of_list:
                    message = f"reads {name!r} of the whole list, which source {source.kind!r} does not know for free"
                    yield Problem((field,), f"{message}; read it in an allocator, or choose another signal")
        for kind, source in self.signals.items():
            if source.kind != kind:
                yield Problem(
                    ("signals", kind, "kind"), f"stands under {kind!r}; a source's key is its kind, {source.kind!r}"
                )
        for kind, source in self.sources.items():
            for found in promises.said("signals", kind, partial(source.problems, self), Problem):
                yield replace(found, location=("signals", kind, *found.location))


def _nearest_divisors(total: int, wrong: int) -> str:
    divisors = [value for value in range(1, total + 1) if total % value == 0]
    below = max((value for value in divisors if value < wrong), default=None)
    above = min((value for value in divisors if value > wrong), default=None)
    return " and ".join(str(value) for value in (below, above) if value is not None)
