"""From signals to the plan of a training step, checked; and plans under made-up signals, which cost nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from aegpo.core import contracts, promises, steps, untouched
from aegpo.core.experiment import Experiment
from aegpo.core.interfaces import Allocator, Merging, TimestepSelector, Tree
from aegpo.core.parts import SignalSpec
from aegpo.core.problems import Problem
from aegpo.core.records import BoolArray, FloatArray, IntArray, Per, RolloutPlan, Signal, StepTable
from aegpo.core.registries import with_shipper
from aegpo.core.sections import TailSpec
from aegpo.core.signals import Signals
from aegpo.core.signatures import built
from aegpo.errors import ContractError, PlanError, SettingError
from aegpo.method.merging import with_merged
from aegpo.method.residual_noise import residual_noise
from aegpo.method.scored_levels import scored_levels
from aegpo.method.tails import with_tail

FIRST, LATE = 1, 10**9  # training steps in any warm-up, and after every warm-up
LEAST_NOISE = 0.01  # std of noise in the latents of images, of 1 in all, from where on it is told
_RANDOM_CURVES = 3
_DRAWS = 24  # plans of an arm that reads nothing of denoising steps: only chance and prompts can differ between them


@dataclass(frozen=True)
class Planned:
    """The decisions of a training step."""

    counts: IntArray  # (P,) rollouts per prompt
    selected: BoolArray  # (P, T)
    plan: RolloutPlan


@dataclass(frozen=True)
class Planner:
    """The parts that decide what a training step samples and learns from."""

    experiment: Experiment
    allocator: Allocator
    selector: TimestepSelector
    tree: Tree

    @classmethod
    def build(cls, experiment: Experiment) -> Planner:
        """Builds the three parts.

        Raises:
            ContractError: if one cannot be built, or lacks what its interface asks for.
        """
        allocator, selector, tree = experiment.allocator, experiment.selector, experiment.tree
        return cls(
            experiment,
            built("allocator", allocator.kind, allocator.build, Allocator),
            built("selector", selector.kind, selector.build, TimestepSelector),
            built("tree", tree.kind, tree.build, Tree),
        )

    @property
    def may_remember(self) -> bool:
        """True if a part is an object of its own, and not the spec, which never changes."""
        spec = self.experiment
        parts: tuple[object, ...] = (self.allocator, self.selector, self.tree)
        return any(part is not own for part, own in zip(parts, (spec.allocator, spec.selector, spec.tree), strict=True))

    def plan(self, signals: Signals, rng: np.random.Generator) -> Planned:
        """How many rollouts each prompt gets, at which steps it learns, and the forest that follows.

        Raises:
            ContractError: if a part fails, or returns what its interface forbids.
            PlanError: if the tree cannot have these rollouts with these steps.
        """
        spec, budget = self.experiment, self.experiment.rollouts.rollouts_per_step
        with contracts.blaming("allocator", spec.allocator.kind, once=True):
            counts = self.allocator.allocate(signals, budget, rng)
            contracts.check_counts(spec.allocator.kind, counts, signals, budget)
        with contracts.blaming("selector", spec.selector.kind, once=True):
            selected = self.selector.select(signals, rng)
            contracts.check_selection(spec.selector.kind, selected, signals)
        counts, selected = untouched.read_only(counts), untouched.read_only(selected)
        with contracts.blaming("tree", spec.tree.kind, once=True):
            plan = self._grown(counts, selected, rng)
        plan = self._merged(plan, counts, selected)
        with contracts.blaming("objective", spec.objective.kind):
            contracts.check_trainable(spec.objective.kind, spec.objective.process, plan)
        with contracts.blaming("sampler", spec.sampler.kind):
            contracts.check_noise(spec.sampler.kind, table_of(spec, plan).std, plan)
        if spec.rollouts.decode == "predicted-clean":
            with contracts.blaming("tree", spec.tree.kind):
                contracts.check_last_split(spec.tree.kind, plan)
        if spec.rollouts.tail is not None:
            _check_solver(spec.rollouts.tail, plan)
            plan = with_tail(plan, spec.sigmas, spec.rollouts.tail)
            contracts.check_forest("'rollouts.tail'", plan, counts, plan.num_steps)
        return Planned(counts, selected, plan)

    def _grown(self, counts: IntArray, selected: BoolArray, rng: np.random.Generator) -> RolloutPlan:
        """The tree's forest; a tree never hears of prompts that were given no rollouts."""
        asked = np.flatnonzero(counts)
        given = untouched.read_only(counts[asked]), untouched.read_only(selected[asked])
        plan = self.tree.plan(*given, rng)
        contracts.check_plan(self.experiment.tree.kind, plan, *given)
        return plan if len(asked) == len(counts) else _of_step(plan, asked)

    def _merged(self, plan: RolloutPlan, counts: IntArray, selected: BoolArray) -> RolloutPlan:
        """The plan with the steps joined that the selector joins, if it joins any."""
        if not isinstance(self.selector, Merging):
            return plan
        kind = self.experiment.selector.kind
        with contracts.blaming("selector", kind):
            until = self.selector.merge(selected)  # read only
            steps.check_ends(kind, until, selected)
            merged = with_merged(plan, until)
            contracts.check_forest(f"selector {kind!r}", merged, counts, plan.num_steps)
        return merged


def _of_step(plan: RolloutPlan, asked: IntArray) -> RolloutPlan:
    """A plan for some prompts of a step, whose rows are `asked`, as a plan of the step."""
    return replace(plan, prompt=tuple(asked[nodes] for nodes in plan.prompt))


def table_of(experiment: Experiment, plan: RolloutPlan) -> StepTable:
    """The coefficients of a plan's steps, in the order of `steps.kinds`: in an ordinary plan those of the schedule.

    Raises:
        ContractError: if the sampler cannot scale its noise, or not as far.
    """
    if plan.scale is None and plan.until is None:
        return experiment.step_table
    sampler, kinds = experiment.sampler, steps.kinds(plan)
    sigmas = experiment.sigmas if plan.tail is None else plan.tail.sigmas
    with contracts.blaming("sampler", sampler.kind):
        if plan.scale is not None:
            steps.check_scaling(sampler.kind, sampler.build())
        table = sampler.table_between(sigmas[kinds.level], sigmas[kinds.until], kinds.scale)
        promises.check_table(sampler.kind, table, len(kinds.level))
    return table


def _check_solver(tail: TailSpec, plan: RolloutPlan) -> None:
    """A solver that looks back a step needs one of the schedule before it."""
    if tail.solver != "euler" and plan.until is not None:
        message = (
            f"'solver: {tail.solver}' looks back one step of the schedule, and this plan joins steps; use 'solver: "
            "euler', or a selector and a tree that join none"
        )
        raise SettingError(message, "rollouts", "tail")


def plan_step(experiment: Experiment, signals: Signals) -> RolloutPlan:
    """The plan of a training step under given signals, checked like the engine's own."""
    return next(plan_steps(experiment, [signals]))


def plan_steps(experiment: Experiment, signals: Iterable[Signals]) -> Iterator[RolloutPlan]:
    """The plans of training steps under given signals, each by parts that remember nothing of the others."""
    planner = Planner.build(experiment)
    for known in signals:
        yield planner.plan(known, np.random.default_rng(known.step)).plan
        if planner.may_remember:
            planner = Planner.build(experiment)


def problems(experiment: Experiment) -> Iterator[Problem]:
    """What only plans show, for an experiment without other problems: rollouts that do not fit, nothing to learn from.

    Plans are made for the first training step and for late ones, where allocators and windows do something else.
    """
    plans: list[RolloutPlan] = []
    signals, kind = list(made_up_signals(experiment)), experiment.advantage.kind
    advantage = built("advantage", kind, experiment.advantage.build)  # its contract: `scored_levels`
    for known in signals[:2] + signals[-2:]:
        try:
            plans.append(plan_step(experiment, known))
            scored_levels(experiment, advantage, plans[-1])
        except (PlanError, ContractError, SettingError) as error:
            yield Problem(error.location, with_shipper(error, error.message))
            return
    if not any(plan.trained_edges for plan in plans):
        yield Problem(
            ("tree",), "no step of the plan is trained: every chosen step has one node only, so nothing differs"
        )
    elif experiment.objective.process == "reverse":
        yield from (Problem(("selector",), message, warning=True) for message in _last_step(experiment, plans))
    only_std = experiment.sampler.model_dump(include={"std_only"}).get("std_only", False)
    if only_std and all(plan.scale is None for plan in plans):
        unused = f"'std_only' changes nothing: tree {experiment.tree.kind!r} as it is set scales no step's noise"
        yield Problem(("sampler",), f"{unused}; leave it out, or use 'tree: {{kind: branching, split_noise: 4}}'", True)


def _last_step(experiment: Experiment, plans: list[RolloutPlan]) -> Iterator[str]:
    """What is probably not meant about a stochastic last step."""
    clean = experiment.rollouts.decode == "predicted-clean"
    if clean and any(_at_last(plan, plan.trained) for plan in plans):
        yield (
            "the last step is trained, but 'rollouts.decode: predicted-clean' paints what was predicted before its "
            "noise: no reward sees what it did, so its credit is chance; choose earlier steps "
            "('last: false', where a selector has it), or set "
            "'rollouts.decode: final'"
        )
    left = max(residual_noise(plan, table_of(experiment, plan), experiment.sigmas) for plan in plans)
    if not clean and left > LEAST_NOISE and any(_at_last(plan, plan.noisy) for plan in plans):
        yield (
            f"the last step adds noise that nothing takes out again: rewards see noise of std {left:.2g} in "
            "the latents (of about 1); end with a deterministic step: choose earlier steps ('last: false', where a "
            "selector has it)"
        )


def _at_last(plan: RolloutPlan, chosen: tuple[BoolArray, ...]) -> bool:
    """True if a rollout's last step is among some edges."""
    return any((last & rows).any() for last, rows in zip(steps.last_steps(plan), chosen, strict=True))


def made_up_signals(experiment: Experiment) -> Iterator[Signals]:
    """Signals of a warm-up step and of later ones, of everything that chosen parts read and no source foresees.

    What must be measured falls, rises and wanders over the denoising steps, and prompts differ in theirs. Falling and
    rising curves put the peaks first and last, which bounds the cost of a tree that splits at them. What is free to
    know of prompts, such as their rewards so far, is unknown at first and then drawn from [0, 1]; where nothing else is
    read, over the steps of the run.
    """
    prompts, steps = experiment.rollouts.prompts_per_step, experiment.rollouts.denoising_steps
    foreseen, invented = dict[str, Signal](), dict[str, tuple[SignalSpec, Per]]()
    for source in experiment.sources.values():
        with contracts.blaming("signals", source.kind):
            foreseen |= source.foreseen(experiment)
        invented |= {name: (source, per) for name, per in source.provides.items() if name not in foreseen}
    known, rng = Signals(FIRST, prompts, experiment.sigmas, foreseen), np.random.default_rng(0)
    free = {
        name
        for name, (source, per) in invented.items()
        if per == "prompt" and promises.cost_of(source, steps).policy == 0
    }
    if len(free) == len(invented):
        stride = max(1, (experiment.training_steps - FIRST) // (_DRAWS - 1))  # the whole run: windows slide
        for index in range(_DRAWS):
            values = np.full(prompts, np.nan) if index == 0 else rng.random(prompts)
            drawn = {name: Signal("prompt", values) for name in invented}
            yield replace(known, step=FIRST + index * stride, known={**foreseen, **drawn})
        return
    remembered = np.random.default_rng(1)
    ramp = np.linspace(1.0, 0.0, steps)
    curves = [ramp, ramp[::-1], *(rng.random(steps) for _ in range(_RANDOM_CURVES))]
    for index, curve in enumerate(curves):
        table: FloatArray = 3.0 + curve + 1e-3 * rng.random((prompts, steps))
        spread = 0.1 * rng.permutation(np.arange(1.0, prompts + 1))
        drawn = {name: Signal(per, _made_up(source, per, table, spread)) for name, (source, per) in invented.items()}
        for step, values in ((FIRST, np.full(prompts, np.nan)), (LATE + index, remembered.random(prompts))):
            drawn |= {name: Signal("prompt", values) for name in free}
            yield replace(known, step=step, known={**foreseen, **drawn})


def _made_up(source: SignalSpec, per: Per, table: FloatArray, spread: FloatArray) -> FloatArray:
    """One signal of a kind, from values (P, T) of steps and (P,) of prompts; NaN where its source measures nothing."""
    if per == "prompt":
        return spread
    steps = table.shape[1]
    values = table.copy()
    with contracts.blaming("signals", source.kind):
        measured = source.measured(steps)
    values[:, np.setdiff1d(np.arange(steps), measured)] = np.nan
    return values if per == "prompt-step" else values.mean(axis=0)
