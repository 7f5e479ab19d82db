"""What an arm will cost, from plans alone: nothing is loaded but the spec.

The plan of a step depends on signals that only a run can measure and on chance, so it is made several times, under
made-up signals and for many steps, and every figure is the range that was seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from aegpo.core import contracts, promises
from aegpo.core.experiment import Experiment
from aegpo.core.interfaces import Advantage, Curriculum
from aegpo.core.records import IntArray, RolloutPlan, Signal
from aegpo.core.sections import DatasetPrompts
from aegpo.core.signals import SignalCost, Signals
from aegpo.core.signatures import built
from aegpo.method.dealing import Deals, expected_gradient_rows, gradient_rows
from aegpo.method.planning import made_up_signals, plan_steps
from aegpo.method.scored_levels import scored_levels
from aegpo.method.trained_edges import TrainedEdges
from aegpo.prompts.lists import read_prompts, refuse_few, refuse_shared

BACKWARD = 3  # a forward-backward in forwards: the backward pass costs about two (Kaplan et al. 2020, Sec. 2.1)


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
    gradient_rows: Range  # states at which the network is evaluated with a gradient, once in each optimizer step
    work: Range  # forwards + 3 for each of these, and 1 more for each frozen policy at a state that is learned from
    expected: bool  # these two are means over how rollouts may be dealt to optimizer steps, which chance decides
    per_rollout: float  # forwards of a rollout, the middle of the range
    predicted: Range  # images that are decoded and scored beside those of the rollouts; no velocity evaluations
    signals: float  # of the policy, mean over the run's steps; 0 where no part reads a signal that costs anything
    signals_base: int  # of the base policy, once in a run for every prompt that occurs
    signals_again: float  # of the base policy, each time a prompt is measured: mean over the run's steps
    candidates: int  # prompts that the run may ask, which are encoded ahead
    encodings: int | None  # bytes that these take on disk at most; None: they are kept nowhere

    def total_work(self, training_steps: int) -> Range:
        """Work and signals of a whole run."""
        signals = round((self.signals + self.signals_again) * training_steps) + self.signals_base
        work = self.work.times(training_steps)
        return Range(work.low + signals, work.high + signals)


def cost(experiment: Experiment) -> Cost:
    """What an arm will cost.

    Raises:
        ContractError: if the allocator, selector or tree returns what its interface forbids.
        AegpoError: if a file of prompts cannot be read.
    """
    return costs({"": experiment})[""]


def costs(arms: Mapping[str, Experiment]) -> dict[str, Cost]:
    """What each arm will cost; prompts that arms share are read once.

    Raises:
        ContractError, AegpoError: as `cost`.
    """
    read: list[tuple[Experiment, int]] = []  # and how many training prompts it has
    found: dict[str, Cost] = {}
    for arm, experiment in arms.items():
        same = (count for other, count in read if _same_prompts(experiment, other))
        prompts = next(same, None) or _prompts(experiment)
        refuse_few(prompts, experiment.rollouts.prompts_per_step)
        read.append((experiment, prompts))
        found[arm] = _cost(experiment, prompts)
    return found


def _same_prompts(one: Experiment, other: Experiment) -> bool:
    return (one.prompts, one.model) == (other.prompts, other.model)


def _cost(experiment: Experiment, prompts: int) -> Cost:
    plans = list(plan_steps(experiment, made_up_signals(experiment)))
    spent = [list(_forwards(experiment, plan)) for plan in plans]
    forwards = _range(made for each in spent for made in each)
    leaves = _range(plan.num_rollouts for plan in plans)
    rows = [gradient_rows_of(experiment, plan) for plan in plans]
    learned = [update_work(experiment, plan, each) for plan, each in zip(plans, rows, strict=True)]
    seen = min(prompts, experiment.rollouts.prompts_per_step * experiment.training_steps)
    candidates = _candidates(experiment, prompts)
    with contracts.blaming("model", experiment.model.kind):
        each_encoding = experiment.model.encoding_bytes
    sources = _sources(experiment)
    times = [_measurements(experiment, prompts, each.refresh) for each in sources]
    measured = sum(each.policy * count for each, count in zip(sources, times, strict=True))
    again = sum(each.base_again * count for each, count in zip(sources, times, strict=True))
    return Cost(
        leaves=leaves,
        forwards=forwards,
        trained_edges=_range(plan.trained_edges for plan in plans),
        gradient_rows=_range(round(each) for each in rows),
        work=_range(round(made + update) for each, update in zip(spent, learned, strict=True) for made in each),
        expected=any(each != round(each) for each in rows),
        per_rollout=(forwards.low + forwards.high) / (leaves.low + leaves.high),
        predicted=_predicted(experiment, plans),
        signals=measured / experiment.training_steps,
        signals_base=seen * sum(each.base for each in sources),
        signals_again=again / experiment.training_steps,
        candidates=candidates,
        encodings=None if each_encoding is None else candidates * each_encoding,
    )


def gradient_rows_of(experiment: Experiment, plan: RolloutPlan, deals: Deals | None = None) -> float:
    """Forward-backwards of a training step: of single states, each once in every optimizer step that needs it.

    In the forward process every trained edge begins at a state of its own. `deals`: what was dealt; None: the mean.
    """
    spec = experiment.optimizer
    if experiment.objective.process == "forward":
        return spec.inner_epochs * plan.trained_edges
    if deals is None:
        return spec.inner_epochs * expected_gradient_rows(plan, spec)
    return sum(gradient_rows(plan, parts) for parts in deals)


def update_work(experiment: Experiment, plan: RolloutPlan, rows: float) -> float:
    """What a training step's learning costs in forwards: `rows` forward-backwards, and each frozen policy once a state.

    What is not evaluated again because sampling retained it is counted all the same: whether it fits in memory is no
    matter of the method.
    """
    objective = experiment.objective
    with contracts.blaming("objective", objective.kind):
        forward = objective.process == "forward"
        states = plan.trained_edges if forward else TrainedEdges.of(plan).begins
        # in the reverse process the rollout had the velocity of the policy that sampled
        return BACKWARD * rows + states * (objective.needs_base + (objective.needs_old and forward))


def _sources(experiment: Experiment) -> list[SignalCost]:
    """What each measured source spends on a prompt."""
    steps = experiment.rollouts.denoising_steps
    return [promises.cost_of(source, steps) for source in experiment.sources.values()]


def _measurements(experiment: Experiment, prompts: int, refresh: int) -> int:
    """How many prompts a source measures in a run, of the policy: all of every step, or those it knows no more.

    A curriculum that reads rewards is asked as if nothing became known.
    """
    per_step = experiment.rollouts.prompts_per_step
    if refresh == 1:
        return per_step * experiment.training_steps
    curriculum, measured, total = _curriculum(experiment, prompts), dict[int, int](), 0
    unknown = {name: Signal("prompt", np.full(prompts, np.nan)) for name in experiment.curriculum.reads}
    for step in range(1, experiment.training_steps + 1):
        known = Signals(step, prompts, experiment.sigmas, unknown)
        with contracts.blaming("curriculum", experiment.curriculum.kind):
            chosen = curriculum.choose(known, per_step, np.random.default_rng(step))
            contracts.check_choice(experiment.curriculum.kind, chosen, prompts, per_step)
        for prompt in chosen.tolist():
            if measured.get(prompt, -refresh) <= step - refresh:
                measured[prompt] = step
                total += 1
    return total


def _curriculum(experiment: Experiment, prompts: int) -> Curriculum:
    spec, per_step = experiment.curriculum, experiment.rollouts.prompts_per_step
    return built("curriculum", spec.kind, partial(spec.build, prompts, per_step, experiment.seed), Curriculum)


def _candidates(experiment: Experiment, prompts: int) -> int:
    """How many prompts the curriculum may ask."""
    with contracts.blaming("curriculum", experiment.curriculum.kind):
        return len(_curriculum(experiment, prompts).candidates(experiment.training_steps))


def _forwards(experiment: Experiment, plan: RolloutPlan) -> Iterator[int]:
    """Velocity evaluations of a plan: all, or less what its trunks take over from a source."""
    taken = [each for each in _sources(experiment) if each.trunk > 0]
    for each in taken:
        yield plan.forwards - int(np.minimum(plan.trunk_levels, each.trunk).sum())
    if not taken or any(each.refresh > 1 for each in taken):
        yield plan.forwards


def _predicted(experiment: Experiment, plans: Sequence[RolloutPlan]) -> Range:
    """Images that the advantage has scored on the way.

    Under made-up signals that must be measured all prompts explore at much the same steps; in a run each may have steps
    of its own, so that the levels of all these plans may be asked for at once.
    """
    advantage = built("advantage", experiment.advantage.kind, experiment.advantage.build, Advantage)
    asked = [scored_levels(experiment, advantage, plan) for plan in plans]
    least = min(_nodes(plan, levels) for plan, levels in zip(plans, asked, strict=True))
    if any(source.policy for source in _sources(experiment)):
        asked = [np.unique(np.concatenate(asked))] * len(plans)
    return Range(least, max(_nodes(plan, levels) for plan, levels in zip(plans, asked, strict=True)))


def _nodes(plan: RolloutPlan, levels: IntArray) -> int:
    """Nodes at some levels; where a plan's tail has made it shorter, as many as it has rollouts."""
    return sum(len(plan.prompt[min(int(level), plan.num_steps)]) for level in levels)


def unread_prompts(experiment: Experiment) -> tuple[str, ...]:
    """The datasets of an experiment's prompts, which only a run reads: nothing here may download."""
    sources = (experiment.prompts.source("train"), experiment.prompts.source("evaluation"))
    return tuple(dict.fromkeys(source.label for source in sources if isinstance(source, DatasetPrompts)))


def _prompts(experiment: Experiment) -> int:
    """How many training prompts there are; both lists are read, so that a file that is missing is found here."""
    if unread_prompts(experiment):
        return experiment.prompts.train_count  # at most
    prompts = read_prompts(experiment, "train")
    refuse_shared(prompts, read_prompts(experiment, "evaluation"))
    return len(prompts)


def _range(values: Iterator[int]) -> Range:
    counts = list(values)
    return Range(min(counts), max(counts))
