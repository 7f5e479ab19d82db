"""Does the signal mean anything? Entropy(t) against what exploring a step brings, delta against what a prompt brings.

Steps: from the deterministic trunk of each prompt, noisy children branch off at every step and run out
deterministically; the spread of their rewards is what exploration at that step has to offer. Prompts: delta-entropy
against the reward a prompt gained between two checkpoints, the spread of rewards within its group and the squared norm
of its loss's gradient. All correlations are of ranks, with intervals for new prompts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from aegpo.core import contracts
from aegpo.core.records import BoolArray, FloatArray, IntArray, Prompt, RolloutPlan
from aegpo.core.signals import Trunk
from aegpo.method.signals.entropy import entropy_options
from aegpo.report.profile.analysis import Analysis
from aegpo.report.profile.groups import SQUARED_NORM, group_values
from aegpo.report.profile.measure import Profile
from aegpo.report.profile.other_signals import measure_signals
from aegpo.report.statistics import Interval, bootstrap_interval, holm, permutation_p, spearman
from aegpo.train.engine import Engine
from aegpo.train.noise import StepNoise, prompt_noise
from aegpo.train.rollouts import roll_out, sample_deterministic
from aegpo.train.scoring import score

CHILDREN = 8  # noisy children of each trunk state
NOISES = 8  # start noises of which a prompt's reward is the mean
_AT_ONCE = 8  # prompts whose children are rolled out together
STEP_NUMBER, NOISE_STD = "step number (falling)", "std of the noise"

Say = Callable[[str], None]
Remeasure = Callable[[], Profile]


@dataclass(frozen=True)
class Correlation:
    """A rank correlation over prompts, or its mean over prompts."""

    predictor: str
    outcome: str
    rho: float  # NaN where one of the two does not vary
    interval: Interval | None  # for new prompts
    p: float | None = None  # permutation, Holm-corrected for its table; None where there is only the interval


@dataclass(frozen=True)
class StepEvidence:
    """Entropy(t) and the spread of rewards that noise at each step causes."""

    steps: IntArray  # (S,) the steps that branched
    reward_std: FloatArray  # (P, S) over the children of each trunk state
    entropy: Mapping[str, FloatArray]  # block -> (P, S) nats, and other signals of steps by "signal NAME"
    along: tuple[Correlation, ...]  # over a prompt's steps; mean over prompts
    own: tuple[Correlation, ...]  # the same, of what differs from the mean curve over prompts
    overlap: float  # share of the chosen steps that are among as many steps with the largest spread; mean over prompts
    overlap_interval: Interval | None
    chance: float  # of that share, for steps drawn at random
    fixed: float  # of that share, for the steps with the largest mean spread, the same for all prompts


@dataclass(frozen=True)
class PromptEvidence:
    """Delta-entropy and what a prompt brought."""

    earlier: int  # checkpoint, 0: the base
    later: int
    delta_at: int  # checkpoint at which delta was measured: `earlier`, or `later` where that is the base
    outcomes: Mapping[str, FloatArray]  # name -> (P,)
    reliability: Mapping[str, float]  # rank correlation of two halves of the measurement
    correlations: tuple[Correlation, ...]
    cosine: float  # of the gradients of two halves of a group, mean over prompts; NaN where nothing is learned
    cosine_interval: Interval | None  # for new prompts


@dataclass(frozen=True)
class Evidence:
    """Both questions."""

    block: str  # what the experiment reads
    prompts: int
    by_step: StepEvidence
    by_prompt: PromptEvidence | None  # None for the base alone, whose delta is zero


# --- steps -----------------------------------------------------------------------------------------------------------


def branch_plan(prompts: int, levels: int, steps: IntArray, children: int) -> tuple[RolloutPlan, IntArray]:
    """One deterministic trunk a prompt; off it, at each of `steps`, noisy `children` that run out deterministically.

    Returns:
        The plan, and for each leaf the step it branched off at; -1 for the trunk's own.
    """
    prompt, branched = [np.arange(prompts)], np.full(prompts, -1)
    parents, noisy = list[IntArray](), list[BoolArray]()
    for step in range(levels):
        fresh = children if step in steps else 0
        parent = np.repeat(np.arange(len(branched)), np.where(branched < 0, 1 + fresh, 1))
        new = np.diff(parent, prepend=-1) == 0  # all children but the first, which goes on without noise
        branched = np.where(new, step, branched[parent])
        prompt.append(prompt[-1][parent])
        parents.append(parent)
        noisy.append(new)
    untrained = tuple(np.zeros_like(each) for each in noisy)
    plan = RolloutPlan(tuple(prompt), tuple(parents), tuple(noisy), untrained)
    leaves = np.full(prompts, 1 + children * len(steps))
    contracts.check_forest("'--validate'", plan, leaves, levels)
    return plan, branched


def measure_reward_std(
    engine: Engine, prompts: Sequence[Prompt], steps: IntArray, children: int, say: Say
) -> FloatArray:
    """(P, S) standard deviation of rewards over the children of each prompt's trunk at each step."""
    how, seed = engine.policy.how, entropy_options(engine.experiment).seed
    parts = []
    for first in range(0, len(prompts), _AT_ONCE):
        part = prompts[first : first + _AT_ONCE]
        plan, branched = branch_plan(len(part), len(how.sigmas) - 1, steps, children)
        starts = prompt_noise(how.model.latent_shape, seed, part, "signal", 0)
        trunk = Trunk(np.arange(len(part)), starts.to(how.sigmas.device))
        cond = how.model.encode(part)
        rollouts = roll_out(how, plan, cond, StepNoise(seed, first), trunk=trunk)
        rewards = total_reward(engine, rollouts.images, [part[row] for row in plan.group])
        for row in range(len(part)):
            of_prompt = plan.group == row
            parts.append([rewards[of_prompt & (branched == step)].std(ddof=1) for step in steps])
        say(f"steps: {first + len(part)} of {len(prompts)} prompts branched")
    return np.array(parts)


def total_reward(engine: Engine, images: Tensor, prompts: Sequence[Prompt]) -> FloatArray:  # (N,)
    """The weighted sum of the experiment's rewards."""
    scores = score(engine.rewards, images, prompts)
    weights = [spec.weight for spec in engine.experiment.rewards]
    total = sum(weight * values.double().cpu() for weight, values in zip(weights, scores.values(), strict=True))
    assert isinstance(total, Tensor), "an experiment has a reward"
    rewards: FloatArray = total.numpy()
    return rewards


def step_evidence(
    reward_std: FloatArray,
    steps: IntArray,
    entropy: Mapping[str, FloatArray],
    stds: FloatArray,
    chosen: BoolArray,
) -> StepEvidence:
    """All about steps: (P, S) spreads, (P, S) entropies by block, (S,) noise and (P, S) chosen steps."""
    rng, prompts = np.random.default_rng(0), len(reward_std)
    simple = {STEP_NUMBER: np.tile(-steps.astype(np.float64), (prompts, 1)), NOISE_STD: np.tile(stds, (prompts, 1))}
    along = [_mean_correlation(name, table, reward_std, rng) for name, table in {**entropy, **simple}.items()]
    rest = reward_std - reward_std.mean(axis=0)
    own = [_mean_correlation(name, table - table.mean(axis=0), rest, rng) for name, table in entropy.items()]
    hits = np.array([_hits(row, spread) for row, spread in zip(chosen, reward_std, strict=True)])
    number = int(chosen[0].sum())
    always = np.zeros(len(steps), dtype=np.bool_)
    always[np.argsort(-reward_std.mean(axis=0), kind="stable")[:number]] = True
    return StepEvidence(
        steps=steps,
        reward_std=reward_std,
        entropy=entropy,
        along=tuple(along),
        own=tuple(own),
        overlap=float(hits.mean()),
        overlap_interval=bootstrap_interval(lambda rows: float(hits[rows].mean()), prompts, rng),
        chance=number / len(steps),
        fixed=float(np.mean([_hits(always, spread) for spread in reward_std])),
    )


def _mean_correlation(name: str, table: FloatArray, outcome: FloatArray, rng: np.random.Generator) -> Correlation:
    """Mean over prompts of the rank correlation over steps; prompts where one of the two is flat are left out."""
    each = np.array([spearman(one, other) for one, other in zip(table, outcome, strict=True)])
    known = each[~np.isnan(each)]
    rho = float(known.mean()) if len(known) else math.nan
    interval = bootstrap_interval(lambda rows: float(known[rows].mean()), len(known), rng)
    return Correlation(name, "std of rewards", rho, interval)


def _hits(chosen: BoolArray, spread: FloatArray) -> float:
    """Which share of the chosen steps are among as many steps with the largest spread."""
    number = int(chosen.sum())
    return float(chosen[np.argsort(-spread, kind="stable")[:number]].sum() / number) if number else math.nan


# --- prompts ---------------------------------------------------------------------------------------------------------


def rewards_at(engine: Engine, prompts: Sequence[Prompt]) -> FloatArray:  # (NOISES, P)
    """Rewards of the engine's policy, deterministic sampler, the same start noises whenever it is asked."""
    how, seed, shape = engine.policy.how, entropy_options(engine.experiment).seed, engine.policy.model.latent_shape
    cond, found = how.model.encode(prompts), []
    for sample in range(NOISES):
        noise = prompt_noise(shape, seed, prompts, "signal", sample)
        with torch.no_grad():
            images = sample_deterministic(how, noise.to(how.sigmas.device), cond)
        found.append(total_reward(engine, images, prompts))
    return np.stack(found)


def prompt_evidence(
    analysis: Analysis, engine: Engine, remeasure: Remeasure, say: Say, signals: Sequence[str] = ()
) -> PromptEvidence:
    """Delta, and other signals of prompts, at one checkpoint against what its prompts bring, there and until the next.

    `remeasure` profiles the policy that the engine has now.
    """
    earlier, later = checkpoint_pair(analysis.target.step, analysis.target.steps)
    analysis.target.load(later, engine)
    after, then = rewards_at(engine, analysis.target.prompts), None
    if earlier == 0:
        then = analysis.policy if later == analysis.target.step else remeasure()
        with engine.policy.base():
            before = rewards_at(engine, analysis.target.prompts)
    else:
        analysis.target.load(earlier, engine)
        before = rewards_at(engine, analysis.target.prompts)
        then = analysis.policy if earlier == analysis.target.step else remeasure()
    assert then is not None, "asked of runs only"
    others = measure_signals(engine, analysis.target.prompts, signals).by_prompt
    groups = group_values(engine, analysis.target.prompts, say)
    gains, first, second = after - before, *np.split(groups.rewards, 2)
    outcomes = {"reward gain": gains.mean(axis=0), "std in group": groups.rewards.std(axis=0, ddof=1)}
    outcomes[SQUARED_NORM] = groups.squared_norms
    halves = {
        "reward gain": spearman(gains[0::2].mean(axis=0), gains[1::2].mean(axis=0)),
        "std in group": spearman(first.std(axis=0, ddof=1), second.std(axis=0, ddof=1)),
    }
    predictors = {f"delta {block}": _moved(then, analysis.base, block) for block in then.blocks}
    predictors[f"entropy {analysis.block}"] = then.curves(analysis.block).mean(axis=1)
    table = _correlations(predictors | others, outcomes)
    known = groups.cosines[~np.isnan(groups.cosines)]
    cosine = bootstrap_interval(lambda rows: float(known[rows].mean()), len(known), np.random.default_rng(0))
    mean = float(known.mean()) if len(known) else math.nan
    return PromptEvidence(earlier, later, earlier or later, outcomes, halves, table, mean, cosine)


def _moved(policy: Profile, base: Profile, block: str) -> FloatArray:  # (P,)
    moved: FloatArray = np.abs(policy.curves(block) - base.curves(block)).mean(axis=1)
    return moved


def checkpoint_pair(step: int, steps: Sequence[int]) -> tuple[int, int]:
    """From the profiled checkpoint to the run's last one; if it is the last, from the one before, or the base (0)."""
    return (step, steps[-1]) if step < steps[-1] else (([0, *steps])[-2], step)


def _correlations(predictors: Mapping[str, FloatArray], outcomes: Mapping[str, FloatArray]) -> tuple[Correlation, ...]:
    rng, found = np.random.default_rng(0), []
    for outcome, values in outcomes.items():
        for predictor, table in predictors.items():
            interval = bootstrap_interval(_resampled(table, values), len(values), rng)
            p = permutation_p(table, values, rng)
            found.append(Correlation(predictor, outcome, spearman(table, values), interval, p))
    corrected = iter(holm([each.p for each in found if each.p is not None and not math.isnan(each.p)]))
    return tuple(
        Correlation(each.predictor, each.outcome, each.rho, each.interval, next(corrected))
        if each.p is not None and not math.isnan(each.p)
        else each
        for each in found
    )


def _resampled(one: FloatArray, other: FloatArray) -> Callable[[IntArray], float]:
    return lambda rows: spearman(one[rows], other[rows])


# --- both ------------------------------------------------------------------------------------------------------------


def gather(analysis: Analysis, engine: Engine, remeasure: Remeasure, say: Say, signals: Sequence[str] = ()) -> Evidence:
    """Everything; the engine has the profiled policy, and another one afterwards. `signals`: names beside entropy."""
    levels = len(engine.policy.how.sigmas) - 1
    steps = np.arange(levels - 1)  # noise of the last step stays in the image
    others = measure_signals(engine, analysis.target.prompts, signals)  # first: it may refuse
    spread = measure_reward_std(engine, analysis.target.prompts, steps, CHILDREN, say)
    entropy = {block: analysis.shown.curves(block)[:, steps] for block in analysis.shown.blocks}
    entropy |= {name: table[:, steps] for name, table in others.by_step.items()}
    nothing = engine.policy.how.sigmas.new_zeros(len(steps), 1, 1, 1)
    sigmas = engine.policy.how.sigmas
    stds = engine.policy.how.sampler.transition(nothing, nothing, sigmas[:-2], sigmas[1:-1]).std.double().cpu().numpy()
    by_step = step_evidence(spread, steps, entropy, stds, analysis.chosen[:, steps])
    by_prompt = None
    if analysis.policy is not None:
        by_prompt = prompt_evidence(analysis, engine, remeasure, say, signals)
    return Evidence(analysis.block, len(analysis.texts), by_step, by_prompt)
