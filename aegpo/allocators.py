"""Which prompts deserve more rollouts: rules that split a step's budget over its prompts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from aegpo.interfaces import IntArray, Signals
from aegpo.specs import AllocatorSpec, Experiment


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

    low: int = Field(8, ge=2, description="rollouts of the lower half (AEGPO, Sec. 4.1)")
    high: int = Field(16, ge=2, description="rollouts of the upper half (AEGPO, Sec. 4.1)")

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


class EntropyAllocator(_SplitAllocator):
    """More rollouts for prompts whose attention entropy moved furthest from the base policy (AEGPO, Sec. 4.1).

    The batch median of delta-entropy splits the prompts. Until `warmup` steps have passed, and where prompts tie at
    the median, every prompt gets the same: at the first step the policy is the base and every delta is zero.
    """

    kind: Literal["entropy"] = "entropy"
    needs_entropy: ClassVar[bool] = True
    warmup: int = Field(1, ge=0, description="training steps with uniform allocation first (our choice)")

    def allocate(self, signals: Signals, budget: int, rng: np.random.Generator) -> IntArray:  # (P,)
        """`high` rollouts above the median of `signals.delta`, `low` below it."""
        half = signals.num_prompts // 2
        order = np.argsort(signals.delta, kind="stable")
        ranked = signals.delta[order]
        if signals.step <= self.warmup or ranked[half - 1] == ranked[half]:
            return _uniform(signals.num_prompts, budget)
        return self.split(order)

    def problems(self, experiment: Experiment) -> Iterator[str]:
        """As for every split; and warm-up needs an equal split of the same budget."""
        yield from super().problems(experiment)
        if (self.low + self.high) % 2:
            yield f"'low' + 'high' must be even for the equal split of the warm-up, not {self.low} + {self.high}"


def _uniform(prompts: int, budget: int) -> IntArray:
    assert budget % prompts == 0, "checked at load"
    return np.full(prompts, budget // prompts, dtype=np.int64)
