"""What an arm will cost, from plans alone: nothing is loaded but the spec.

The plan of a step depends on entropies that only a run can measure and on chance, so it is made several times, under
made-up entropies and for many steps, and every figure is the range that was seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from aegpo import contracts
from aegpo.interfaces import FloatArray, RolloutPlan, Signals
from aegpo.prompts import PromptStream, read_prompts, refuse_shared
from aegpo.specs import Experiment

FIRST, LATE = 1, 10**9  # training steps in any warm-up, and after every warm-up
BACKWARD = 3  # a forward-backward in forwards: the backward pass costs about two (Kaplan et al. 2020, Sec. 2.1)
_RANDOM_CURVES = 3
_DRAWS = 24  # plans of an arm that reads no entropy: only chance can differ between them


@dataclass(frozen=True)
class Range:
    """The least and the most of a count among the plans that were made."""

    low: int
    high: int

    def __str__(self) -> str:
        return f"{self.low:,}" if self.low == self.high else f"{self.low:,}-{self.high:,}"

    def times(self, factor: int) -> Range:
        """Both ends, `factor` times."""
        return Range(self.low * factor, self.high * factor)


@dataclass(frozen=True)
class Cost:
    """What a training step of one arm costs, in velocity evaluations of single latents."""

    leaves: Range  # rollouts
    forwards: Range  # of executing the plan
    trained_edges: Range
    work: Range  # forwards + 3 for every pass over a trained edge (4 where the objective reads the base policy too)
    per_rollout: float  # forwards of a rollout, the middle of the range
    probe: int  # of the policy, in every step; 0 where no part reads entropy
    probe_base: int  # of the base policy, once in a run for every prompt that occurs

    def total_work(self, training_steps: int) -> Range:
        """Work and probes of a whole run."""
        probes = self.probe * training_steps + self.probe_base
        work = self.work.times(training_steps)
        return Range(work.low + probes, work.high + probes)


def cost(experiment: Experiment) -> Cost:
    """What the arm will cost.

    Raises:
        ContractError: if the allocator, selector or tree returns what its interface forbids.
        AegpoError: if a file of prompts cannot be read.
    """
    plans = [plan_step(experiment, signals) for signals in made_up_signals(experiment)]
    forwards = _range(plan.forwards for plan in plans)
    leaves = _range(plan.num_rollouts for plan in plans)
    passes = experiment.optimizer.inner_epochs
    update = passes * (BACKWARD + experiment.objective.needs_base)
    probe = experiment.rollouts.prompts_per_step * experiment.rollouts.denoising_steps * experiment.needs_entropy
    seen = min(_num_prompts(experiment), experiment.rollouts.prompts_per_step * experiment.training_steps)
    return Cost(
        leaves=leaves,
        forwards=forwards,
        trained_edges=_range(plan.trained_edges for plan in plans),
        work=_range(plan.forwards + update * plan.trained_edges for plan in plans),
        per_rollout=(forwards.low + forwards.high) / (leaves.low + leaves.high),
        probe=probe,
        probe_base=seen * experiment.rollouts.denoising_steps * experiment.needs_entropy,
    )


def _num_prompts(experiment: Experiment) -> int:
    """Training prompts; both lists are read, so that a file that is missing or too short is found here."""
    texts = read_prompts(experiment, "train")
    PromptStream(texts, experiment.rollouts.prompts_per_step, experiment.seed)
    refuse_shared(texts, read_prompts(experiment, "evaluation"))
    return len(texts)


def plan_step(experiment: Experiment, signals: Signals) -> RolloutPlan:
    """The plan of a training step under given signals, checked like the engine's own."""
    rng = np.random.default_rng(signals.step)
    counts = experiment.allocator.build().allocate(signals, experiment.rollouts.rollouts_per_step, rng)
    contracts.check_counts(experiment.allocator.kind, counts, signals, experiment.rollouts.rollouts_per_step)
    steps = experiment.selector.build().select(signals, rng)
    contracts.check_selection(experiment.selector.kind, steps, signals)
    plan = experiment.tree.build().plan(counts, steps, rng)
    contracts.check_plan(experiment.tree.kind, plan, counts, steps)
    return plan


def made_up_signals(experiment: Experiment) -> Iterator[Signals]:
    """Signals of a warm-up step and of later ones: entropies that fall, that rise and that wander, with unequal deltas.

    Falling and rising curves put the peaks first and last, which bounds the cost of a tree that splits at them. Where
    no part reads entropies there are none, as in the engine, and only the draws differ.
    """
    prompts, steps = experiment.rollouts.prompts_per_step, experiment.rollouts.denoising_steps
    if not experiment.needs_entropy:
        yield from (Signals(FIRST + index, prompts, experiment.sigmas) for index in range(_DRAWS))
        return
    rng = np.random.default_rng(0)
    ramp = np.linspace(1.0, 0.0, steps)
    curves = [ramp, ramp[::-1], *(rng.random(steps) for _ in range(_RANDOM_CURVES))]
    for index, curve in enumerate(curves):
        entropy: FloatArray = 3.0 + curve + 1e-3 * rng.random((prompts, steps))
        base = entropy - 0.1 * rng.permutation(np.arange(1.0, prompts + 1))[:, None]
        for step in (FIRST, LATE + index):
            yield Signals(step, prompts, experiment.sigmas, entropy, base)


def _range(values: Iterator[int]) -> Range:
    counts = list(values)
    return Range(min(counts), max(counts))
