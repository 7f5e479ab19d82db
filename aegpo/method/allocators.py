"""Which prompts deserve more rollouts: rules that split a step's budget over its prompts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
from pydantic import Field

from aegpo.core.experiment import Experiment
from aegpo.core.parts import AllocatorSpec
from aegpo.core.records import FloatArray, IntArray
from aegpo.core.signals import Signals
from aegpo.errors import PlanError
from aegpo.method.signals.entropy_options import ENTROPY_DELTA
from aegpo.method.signals.rewards import REWARD_MEAN, REWARD_STD


class UniformAllocator(AllocatorSpec):
    """The same number of rollouts for every prompt (GRPO)."""

    kind: Literal["uniform"] = "uniform"

    def allocate(self, signals: Signals, budget: int, rng: np.random.Generator) -> IntArray:  # (P,)
        """budget / P each; the budget is a multiple of P, which is checked at load."""
        return _uniform(signals.num_prompts, budget)

    def problems(self, experiment: Experiment) -> Iterator[str]:
        """The budget must be a multiple of the prompts."""
        prompts, budget = experiment.rollouts.prompts_per_step, experiment.rollouts.rollouts_per_step
        if budget % prompts:
            below, above = budget // prompts * prompts, (budget // prompts + 1) * prompts
            valid = f"{below} and {above}" if below >= 2 * prompts else str(above)
            yield f"{budget} rollouts cannot be split equally over {prompts} prompts; nearest that can: {valid}"


class _SplitAllocator(AllocatorSpec):
    """Half of the prompts get `low` rollouts, the other half `high`."""

    low: int = Field(8, ge=0, le=65536, description="rollouts of the lower half (AEGPO, Sec. 4.1); 0: it is not asked")
    high: int = Field(16, ge=2, le=65536, description="rollouts of the upper half (AEGPO, Sec. 4.1)")

    def split(self, order: IntArray) -> IntArray:  # (P,) prompts from low to high -> (P,) counts
        """Counts for prompts ranked from the least to the most deserving."""
        counts = np.full(len(order), self.low, dtype=np.int64)
        counts[order[len(order) // 2 :]] = self.high
        return counts

    def problems(self, experiment: Experiment) -> Iterator[str]:
        """An even number of prompts, and a budget of P (low + high) / 2."""
        prompts, budget = experiment.rollouts.prompts_per_step, experiment.rollouts.rollouts_per_step
        if self.high < self.low:
            yield f"'high' ({self.high}) is below 'low' ({self.low})"
            return
        if self.low == 1:
            yield "'low' is 1, which has nothing to be compared with; 0 does not ask the prompt, 2 compares"
        if prompts % 2:
            near = f"{prompts - 1} and {prompts + 1}" if prompts > 1 else "2"
            yield f"a median split needs an even number of prompts per step, not {prompts}; nearest: {near}"
        elif prompts * (self.low + self.high) != 2 * budget:
            spent = prompts * (self.low + self.high) // 2
            yield (
                f"half of {prompts} prompts with {self.low} rollouts and half with {self.high} spend {spent}, "
                f"but rollouts_per_step is {budget}; set it to {spent}, or change 'low' and 'high'"
            )


class RandomAllocator(_SplitAllocator):
    """The low/high split of the entropy allocator over prompts drawn at random: its control at equal cost."""

    kind: Literal["random"] = "random"

    def allocate(self, signals: Signals, budget: int, rng: np.random.Generator) -> IntArray:  # (P,)
        """`high` rollouts for a random half of the prompts, `low` for the others."""
        return self.split(rng.permutation(signals.num_prompts))


class _SignalSplit(_SplitAllocator):
    """A split by a signal at the batch median, after a warm-up."""

    warmup: int = Field(1, ge=0, le=1_000_000, description="training steps with uniform allocation first (our choice)")

    def allocate(self, signals: Signals, budget: int, rng: np.random.Generator) -> IntArray:  # (P,)
        """`high` rollouts above the median of the signal it reads, `low` below it."""
        half = signals.num_prompts // 2
        values = _completed(signals.by_prompt(self.reads[0]))
        order = np.argsort(values, kind="stable")
        ranked = values[order]
        if signals.step <= self.warmup or ranked[half - 1] == ranked[half]:
            return _uniform(signals.num_prompts, budget)
        return self.split(order)

    def cautions(self, experiment: Experiment) -> Iterator[str]:
        """A warm-up that ends before the run does."""
        if self.warmup >= experiment.training_steps:
            yield (
                f"'warmup' {self.warmup} is all of the run's {experiment.training_steps} training steps, so the signal "
                "never splits the prompts; lower it, or train longer"
            )

    def problems(self, experiment: Experiment) -> Iterator[str]:
        """As for every split; a signal of prompts; and warm-up needs an equal split of the same budget."""
        yield from super().problems(experiment)
        if (self.low + self.high) % 2:
            yield f"'low' + 'high' must be even for the equal split of the warm-up, not {self.low} + {self.high}"
        source = experiment.source(self.reads[0])
        if source is not None and (per := source.provides[self.reads[0]]) != "prompt":
            yield f"signal {self.reads[0]!r} has values by {per}; a split of prompts needs one that has them by prompt"


class MedianSplitAllocator(_SignalSplit):
    """More rollouts for prompts in the upper half of any signal: AEGPO's rule with a signal of your choice.

    The batch median of the signal splits the prompts. Until `warmup` steps have passed, and where prompts tie at the
    median, every prompt gets the same. Prompts of which nothing is known yet count with the mean of the others.
    """

    kind: Literal["median-split"] = "median-split"
    signal: str = Field(description="the signal that splits the prompts, such as entropy-delta or reward-std")

    @property
    def reads(self) -> tuple[str, ...]:
        """The signal it is told to read."""
        return (self.signal,)


class _DeltaSplit(_SignalSplit):
    """A split by how far attention entropy moved."""

    @property
    def reads(self) -> tuple[str, ...]:
        """How far the entropies of each prompt moved from the base policy's."""
        return (ENTROPY_DELTA,)


class EntropyAllocator(_DeltaSplit):
    """More rollouts for prompts whose attention entropy moved furthest from the base policy (AEGPO, Sec. 4.1).

    The batch median of delta-entropy splits the prompts. Until `warmup` steps have passed, and where prompts tie at
    the median, every prompt gets the same: at the first step the policy is the base and every delta is zero. It is
    `median-split` of the signal `entropy-delta`.
    """

    kind: Literal["entropy"] = "entropy"


class InvertedAllocator(_DeltaSplit):
    """AEGPO's split upside down: more rollouts for prompts whose attention entropy moved least. A control."""

    kind: Literal["inverted"] = "inverted"

    def split(self, order: IntArray) -> IntArray:  # (P,)
        """Counts for prompts ranked from the most to the least deserving of the paper's rule."""
        return super().split(order[::-1])


class _RewardAllocator(AllocatorSpec):
    """Counts within bounds by what is known of a prompt's rewards. It costs nothing."""

    low: int = Field(8, ge=2, le=65536, description="least rollouts of a prompt (AEGPO's lower half: 8)")
    high: int = Field(16, ge=2, le=65536, description="most rollouts of a prompt (AEGPO's upper half: 16)")

    def problems(self, experiment: Experiment) -> Iterator[str]:
        """A budget between the bounds."""
        prompts, budget = experiment.rollouts.prompts_per_step, experiment.rollouts.rollouts_per_step
        if self.high < self.low:
            yield f"'high' ({self.high}) is below 'low' ({self.low})"
        elif not prompts * self.low <= budget <= prompts * self.high:
            yield (
                f"{prompts} prompts with {self.low} to {self.high} rollouts spend {prompts * self.low} to "
                f"{prompts * self.high}, but rollouts_per_step is {budget}; set it within, or change 'low' and 'high'"
            )

    def cautions(self, experiment: Experiment) -> Iterator[str]:
        """Prompts that never come again teach nothing about themselves."""
        seen = experiment.training_steps * experiment.rollouts.prompts_per_step
        if experiment.prompts.source("train") is None and seen <= experiment.prompts.train_count:
            yield (
                f"{seen} prompts are seen in the run and {experiment.prompts.train_count} exist, so none comes twice "
                "and every split is equal; train longer, or lower 'prompts.train_count'"
            )

    @property
    def reads(self) -> tuple[str, ...]:
        """The spread of each prompt's rewards so far."""
        return (REWARD_STD,)

    def numbers(self) -> IntArray:  # (high - low + 1,)
        """Every number of rollouts that a prompt may get."""
        return np.arange(self.low, self.high + 1)


class RewardStdAllocator(_RewardAllocator):
    """Rollouts in proportion to the spread of a prompt's rewards so far (Neyman allocation; DynaMO): a control.

    n_i is proportional to the std of rewards within the prompt's group, averaged over its visits, within `low` and
    `high`; fractions go to the largest remainders. Prompts that were not seen yet count with the mean std of those that
    were; where nothing is known, or nothing varies, all get the same.
    """

    kind: Literal["reward-std"] = "reward-std"

    def allocate(self, signals: Signals, budget: int, rng: np.random.Generator) -> IntArray:  # (P,)
        """Counts by the signal `reward-std`."""
        std = _completed(signals.by_prompt(REWARD_STD))
        return proportional(std if std.any() else np.ones(signals.num_prompts), budget, self.low, self.high)


class VarianceAllocator(_RewardAllocator):
    """The split with the least variance of the policy gradient (VIP, arXiv 2602.01601, Thm. 5.1): a control.

    It minimises sum_i a_i (n_i - 1) / n_i^2, the variance of a gradient whose baseline is the group's mean, in whole
    numbers within `low` and `high`. VIP has a_i = 4 p_i (1 - p_i), the variance of rewards of -1 and 1, and predicts
    the rate of success p_i from the prompt's words; here a_i is the variance of the prompt's rewards so far, which is
    the same for such rewards and is there for all others. Prompts that were not seen yet count as in `reward-std`.
    """

    kind: Literal["variance"] = "variance"
    low: int = Field(
        8, ge=3, le=65536, description="least rollouts of a prompt; not 2, from where the third saves least (ours: 8)"
    )

    def allocate(self, signals: Signals, budget: int, rng: np.random.Generator) -> IntArray:  # (P,)
        """Counts by the signal `reward-std`."""
        std, numbers = _completed(signals.by_prompt(REWARD_STD)), self.numbers()
        return most_valuable(-(std[:, None] ** 2) * (numbers - 1) / numbers**2, budget, self.low)


class KnapsackAllocator(_RewardAllocator):
    """Rollouts where they are likeliest to show both success and failure (Knapsack RL, arXiv 2509.25849): a control.

    It maximises sum_i v_i (1 - p_i^n_i - (1 - p_i)^n_i) in whole numbers within `low` and `high`: the chance that a
    group's rewards are not all the same, times v_i = p_i (1 - p_i)^2, what its gradient is worth, which is most for
    rare successes. p_i, the rate of success, is the mean of the prompt's rewards so far: they must be 0 and 1, as of
    `scene` with `strict`, or lie between, which then counts as partial success (our reading). Prompts that were not
    seen yet count with the mean rate of those that were; where nothing is known all get the same.
    """

    kind: Literal["knapsack"] = "knapsack"

    @property
    def reads(self) -> tuple[str, ...]:
        """The mean of each prompt's rewards so far."""
        return (REWARD_MEAN,)

    def allocate(self, signals: Signals, budget: int, rng: np.random.Generator) -> IntArray:  # (P,)
        """Counts by the signal `reward-mean`.

        Raises:
            PlanError: if a prompt's mean reward is no rate of success.
        """
        rate = _completed(signals.by_prompt(REWARD_MEAN), unknown=0.5)
        if rate.min() < 0 or rate.max() > 1:
            worst = rate.max() if rate.max() > 1 else rate.min()
            raise PlanError(
                f"allocator 'knapsack' reads a prompt's mean reward as its rate of success, but found {worst:.4g}; "
                "give it rewards between 0 and 1, or choose 'variance' or 'reward-std'"
            )
        p, numbers = rate[:, None], self.numbers()
        return most_valuable(p * (1 - p) ** 2 * (1 - p**numbers - (1 - p) ** numbers), budget, self.low)


def most_valuable(values: FloatArray, budget: int, low: int) -> IntArray:  # (P, K) -> (P,)
    """Whole numbers that add up to `budget` and make the sum of values greatest; values[i, k] is of low + k rollouts.

    Each further rollout of a prompt must be worth no more than the one before. Then the best are simply taken in turn
    (Fox 1966); of equals, those of prompts with fewest rollouts.
    """
    gains = np.diff(values, axis=1)  # (P, K-1)
    further = np.broadcast_to(np.arange(gains.shape[1]), gains.shape)
    best = np.lexsort((further.ravel(), -gains.ravel()))[: budget - low * len(values)]
    counts: IntArray = low + np.bincount(best // max(1, gains.shape[1]), minlength=len(values)).astype(np.int64)
    return counts


def _completed(known: FloatArray, unknown: float = 1.0) -> FloatArray:  # (P,)
    """What is known of each prompt, with the mean of it, or else `unknown`, for prompts that were not seen yet."""
    if np.isnan(known).all():
        return np.full(len(known), unknown)
    return np.where(np.isnan(known), np.nanmean(known), known)


def proportional(weights: FloatArray, budget: int, low: int, high: int) -> IntArray:  # (P,)
    """Whole numbers in proportion to weights, within bounds, that add up to `budget`: by largest remainders.

    The factor of proportionality is found by halving: the sum of clipped shares grows with it.
    """
    assert len(weights) * low <= budget <= len(weights) * high, "checked at load"
    weights = np.maximum(weights, 1e-9 * weights.max())  # so that shares of 0 can grow, too
    least, most = 0.0, high / float(weights.min())
    for _ in range(200):
        middle = (least + most) / 2
        below = np.clip(middle * weights, low, high).sum() < budget
        least, most = (middle, most) if below else (least, middle)
    shares = np.clip(most * weights, low, high)
    counts = np.floor(shares + 1e-9).astype(np.int64)
    order = np.argsort(-(shares - counts), kind="stable")
    while (missing := budget - int(counts.sum())) > 0:
        counts[[index for index in order if counts[index] < high][:missing]] += 1
    assert missing == 0, "floors of shares do not exceed the budget"
    return counts


def _uniform(prompts: int, budget: int) -> IntArray:
    assert budget % prompts == 0, "checked at load"
    return np.full(prompts, budget // prompts, dtype=np.int64)
