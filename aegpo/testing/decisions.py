"""Conformance of the parts that decide: allocators, selectors and trees; numpy only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

import numpy as np

from aegpo.core import contracts
from aegpo.core.experiment import Experiment
from aegpo.core.interfaces import Allocator, Merging, TimestepSelector, Tree
from aegpo.core.parts import AllocatorSpec, SelectorSpec, SignalSpec, TreeSpec
from aegpo.core.records import Per, Signal
from aegpo.core.registry import suggestion
from aegpo.core.sections import RolloutsSpec
from aegpo.core.signals import Signals
from aegpo.core.signatures import built
from aegpo.core.steps import check_ends
from aegpo.errors import ContractError, PlanError
from aegpo.method.advantages import GroupAdvantage
from aegpo.method.allocators import UniformAllocator
from aegpo.method.objectives import ClippedObjective
from aegpo.method.samplers import FlowSde
from aegpo.method.selectors import UniformSelector
from aegpo.method.trees import IndependentTree
from aegpo.models.shapes import ShapesSpec
from aegpo.plugin.manager import load_registries, plugin_manager
from aegpo.prompts.curricula import ShuffleCurriculum
from aegpo.rewards.palette import PaletteReward
from aegpo.testing.common import SIZES, check_equal, check_memory, check_spec, decision_rng, tree_inputs

_BUDGETS = (2, 3, 8, 12, 16)  # rollouts of a prompt on average


def check_allocator(spec: AllocatorSpec) -> None:
    """Counts of at least 2 that add up to the budget, for every size that `problems` lets pass, and deterministic."""
    check_spec(spec)
    first, second, tried = built("allocator", spec.kind, spec.build, Allocator), spec.build(), 0
    for (prompts, steps), each, extra in product(SIZES, _BUDGETS, (0, 1)):
        budget = prompts * each + extra
        rollouts = RolloutsSpec(prompts_per_step=prompts, rollouts_per_step=budget, denoising_steps=steps)
        if any(spec.problems(experiment_with(rollouts, allocator=spec))):
            continue
        tried += 1
        for signals in _signals(prompts, steps, spec.reads):
            counts = first.allocate(signals, budget, decision_rng())
            contracts.check_counts(spec.kind, counts, signals, budget)
            check_equal(f"allocator {spec.kind!r}", counts, second.allocate(signals, budget, decision_rng()))
    if not tried:
        raise ContractError(f"allocator {spec.kind!r} has problems with each of {len(SIZES) * 10} usual sizes")
    check_memory(
        f"allocator {spec.kind!r}", first, spec.build(), lambda part: part.allocate(signals, budget, decision_rng())
    )


def check_selector(spec: SelectorSpec) -> None:
    """At least one denoising step a prompt, for every size that `problems` lets pass, and deterministic.

    A selector that joins steps must join whole runs.
    """
    check_spec(spec)
    first, second, tried = built("selector", spec.kind, spec.build, TimestepSelector), spec.build(), 0
    for prompts, steps in SIZES:
        rollouts = RolloutsSpec(prompts_per_step=prompts, rollouts_per_step=8 * prompts, denoising_steps=steps)
        if any(spec.problems(experiment_with(rollouts, selector=spec))):
            continue
        tried += 1
        for signals in _signals(prompts, steps, spec.reads):
            selected = first.select(signals, decision_rng())
            contracts.check_selection(spec.kind, selected, signals)
            check_equal(f"selector {spec.kind!r}", selected, second.select(signals, decision_rng()))
            if isinstance(first, Merging):
                check_ends(spec.kind, first.merge(selected), selected)
    if not tried:
        raise ContractError(f"selector {spec.kind!r} has problems with each of {len(SIZES)} usual sizes")
    check_memory(f"selector {spec.kind!r}", first, spec.build(), lambda part: part.select(signals, decision_rng()))


def check_tree(spec: TreeSpec) -> None:
    """Proper forests with exactly the asked leaves, for equal and unequal counts and any steps, and deterministic.

    A tree may refuse counts that are too few for their steps with a `PlanError`, though not all of them.
    """
    check_spec(spec)
    first, second, planned = built("tree", spec.kind, spec.build, Tree), spec.build(), 0
    for counts, steps in tree_inputs():
        try:
            plan = first.plan(counts, steps, decision_rng())
        except PlanError:
            continue
        planned += 1
        contracts.check_plan(spec.kind, plan, counts, steps)
        again = second.plan(counts, steps, decision_rng())
        for field in ("prompt", "parent", "noisy", "trained", "scale", "until"):
            for one, other in zip(vars(plan)[field] or (), vars(again)[field] or (), strict=True):
                check_equal(f"tree {spec.kind!r}", one, other)
    if not planned:
        raise ContractError(f"tree {spec.kind!r} cannot plan for any of the usual counts and steps")


def _signals(prompts: int, steps: int, reads: Sequence[str]) -> Iterator[Signals]:
    """First, early and late training steps under flat, tied, rising, falling and random signals of what is read."""
    rng, sigmas, per = decision_rng(), np.linspace(1.0, 0.0, steps + 1), _provided(reads)
    ramp = np.linspace(0.0, 1.0, steps)
    curves = [np.zeros((prompts, steps)), np.tile(ramp, (prompts, 1)), np.tile(-ramp, (prompts, 1))]
    curves += [rng.random((prompts, steps)), rng.integers(0, 2, (prompts, steps)).astype(np.float64)]
    for step, curve, shift in product((1, 2, 10**6), curves, (np.zeros(prompts), rng.random(prompts))):
        unseen = np.where(shift > 0.5, np.nan, shift)
        for values in (shift, unseen):
            every = {"prompt": values, "step": 3 + curve[0], "prompt-step": 3 + curve}
            yield Signals(step, prompts, sigmas, {name: Signal(kind, every[kind]) for name, kind in per.items()})


def _provided(reads: Sequence[str]) -> dict[str, Per]:
    """What each signal that is read has a value for, by the installed sources.

    Raises:
        ContractError: if no source provides one.
    """
    sources = load_registries(plugin_manager()).signals
    provided = {name: per for source in sources for name, per in source.spec.provides.items()}
    for name in reads:
        if name not in provided:
            raise ContractError(f"no installed source provides the signal {name!r}; {suggestion(name, provided)}")
    return {name: provided[name] for name in reads}


def experiment_with(
    rollouts: RolloutsSpec,
    allocator: AllocatorSpec | None = None,
    selector: SelectorSpec | None = None,
    source: SignalSpec | None = None,
) -> Experiment:
    """GRPO on the embedded model with a part of somebody's."""
    signals = {entry.name: entry.spec(kind=entry.name) for entry in load_registries(plugin_manager()).signals}
    return Experiment(
        rollouts=rollouts,
        model=ShapesSpec(),
        rewards=(PaletteReward(),),
        curriculum=ShuffleCurriculum(),
        allocator=allocator or UniformAllocator(),
        selector=selector or UniformSelector(),
        tree=IndependentTree(),
        sampler=FlowSde(),
        advantage=GroupAdvantage(),
        objective=ClippedObjective(),
        signals=signals if source is None else {**signals, source.kind: source},
    )
