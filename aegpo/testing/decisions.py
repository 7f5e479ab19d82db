"""Conformance of the parts that decide: allocators, selectors and trees; numpy only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import numpy as np

from aegpo.core import contracts
from aegpo.core.experiment import Experiment
from aegpo.core.parts import AllocatorSpec, SelectorSpec, TreeSpec
from aegpo.core.records import Signals
from aegpo.core.sections import RolloutsSpec
from aegpo.errors import ContractError, PlanError
from aegpo.method.advantages import GroupAdvantage
from aegpo.method.allocators import UniformAllocator
from aegpo.method.objectives import ClippedObjective
from aegpo.method.samplers import FlowSde
from aegpo.method.selectors import UniformSelector
from aegpo.method.trees import IndependentTree
from aegpo.models.shapes import ShapesSpec
from aegpo.rewards.palette import PaletteReward
from aegpo.testing.common import SIZES, check_equal, check_memory, check_spec, decision_rng, tree_inputs

_BUDGETS = (2, 3, 8, 12, 16)  # rollouts of a prompt on average


def check_allocator(spec: AllocatorSpec) -> None:
    """Counts of at least 2 that add up to the budget, for every size that `problems` lets pass, and deterministic."""
    check_spec(spec)
    first, second, tried = spec.build(), spec.build(), 0
    for (prompts, steps), each, extra in product(SIZES, _BUDGETS, (0, 1)):
        budget = prompts * each + extra
        rollouts = RolloutsSpec(prompts_per_step=prompts, rollouts_per_step=budget, denoising_steps=steps)
        if any(spec.problems(_experiment(rollouts, allocator=spec))):
            continue
        tried += 1
        for signals in _signals(prompts, steps, spec.needs_entropy):
            counts = first.allocate(signals, budget, decision_rng())
            contracts.check_counts(spec.kind, counts, signals, budget)
            check_equal(f"allocator {spec.kind!r}", counts, second.allocate(signals, budget, decision_rng()))
    if not tried:
        raise ContractError(f"allocator {spec.kind!r} has problems with each of {len(SIZES) * 10} usual sizes")
    check_memory(
        f"allocator {spec.kind!r}", first, spec.build(), lambda part: part.allocate(signals, budget, decision_rng())
    )


def check_selector(spec: SelectorSpec) -> None:
    """At least one denoising step a prompt, for every size that `problems` lets pass, and deterministic."""
    check_spec(spec)
    first, second, tried = spec.build(), spec.build(), 0
    for prompts, steps in SIZES:
        rollouts = RolloutsSpec(prompts_per_step=prompts, rollouts_per_step=8 * prompts, denoising_steps=steps)
        if any(spec.problems(_experiment(rollouts, selector=spec))):
            continue
        tried += 1
        for signals in _signals(prompts, steps, spec.needs_entropy):
            selected = first.select(signals, decision_rng())
            contracts.check_selection(spec.kind, selected, signals)
            check_equal(f"selector {spec.kind!r}", selected, second.select(signals, decision_rng()))
    if not tried:
        raise ContractError(f"selector {spec.kind!r} has problems with each of {len(SIZES)} usual sizes")
    check_memory(f"selector {spec.kind!r}", first, spec.build(), lambda part: part.select(signals, decision_rng()))


def check_tree(spec: TreeSpec) -> None:
    """Proper forests with exactly the asked leaves, for equal and unequal counts and any steps, and deterministic.

    A tree may refuse counts that are too few for their steps with a `PlanError`, though not all of them.
    """
    check_spec(spec)
    first, second, planned = spec.build(), spec.build(), 0
    for counts, steps in tree_inputs():
        try:
            plan = first.plan(counts, steps, decision_rng())
        except PlanError:
            continue
        planned += 1
        contracts.check_plan(spec.kind, plan, counts, steps)
        again = second.plan(counts, steps, decision_rng())
        for field in ("prompt", "parent", "noisy", "trained"):
            for one, other in zip(vars(plan)[field], vars(again)[field], strict=True):
                check_equal(f"tree {spec.kind!r}", one, other)
    if not planned:
        raise ContractError(f"tree {spec.kind!r} cannot plan for any of the usual counts and steps")


def _signals(prompts: int, steps: int, entropy: bool) -> Iterator[Signals]:
    """First, early and late training steps under flat, tied, rising, falling and random entropies."""
    rng, sigmas = decision_rng(), np.linspace(1.0, 0.0, steps + 1)
    ramp = np.linspace(0.0, 1.0, steps)
    curves = [np.zeros((prompts, steps)), np.tile(ramp, (prompts, 1)), np.tile(-ramp, (prompts, 1))]
    curves += [rng.random((prompts, steps)), rng.integers(0, 2, (prompts, steps)).astype(np.float64)]
    for step, curve, shift in product((1, 2, 10**6), curves, (np.zeros(prompts), rng.random(prompts))):
        signals = Signals(step, prompts, sigmas, stds=FlowSde().table(sigmas).std)
        spread = np.where(shift > 0.5, np.nan, shift)
        signals = replace(signals, reward_std=spread, reward_mean=2 * spread)
        known = {"entropy": 3 + curve, "base_entropy": 3 + curve + shift[:, None]} if entropy else {}
        yield replace(signals, **known)


def _experiment(
    rollouts: RolloutsSpec, allocator: AllocatorSpec | None = None, selector: SelectorSpec | None = None
) -> Experiment:
    return Experiment(
        rollouts=rollouts,
        model=ShapesSpec(),
        rewards=(PaletteReward(),),
        allocator=allocator or UniformAllocator(),
        selector=selector or UniformSelector(),
        tree=IndependentTree(),
        sampler=FlowSde(),
        advantage=GroupAdvantage(),
        objective=ClippedObjective(),
    )
