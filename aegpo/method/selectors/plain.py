"""What selectors share, and steps without any signal: all of them, named ones, random ones, the first, the noisiest."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import numpy as np
from pydantic import Field

from aegpo.core.experiment import Experiment
from aegpo.core.parts import SelectorSpec
from aegpo.core.records import BoolArray, FloatArray
from aegpo.core.signals import Signals
from aegpo.method.signals.noise import STEP_NOISE


class Selector(SelectorSpec):
    """What most selectors share: whether the last denoising step may be chosen."""

    last: bool = Field(
        False, description="the last step may be chosen; its noise stays in the image (Flow-GRPO trains the first T-1)"
    )

    def eligible(self, steps: int) -> int:
        """Steps 0 .. eligible-1 of a trajectory of `steps` may be chosen."""
        return steps - (0 if self.last else 1)


class CountedSelector(Selector):
    """What selectors of a fixed number of steps share: `top_k` must be available."""

    top_k: int = Field(4, ge=1, le=1000, description="denoising steps chosen for each prompt (AEGPO, Sec. 4.2)")

    def problems(self, experiment: Experiment) -> Iterator[str]:
        """No more steps than there are."""
        most = self.eligible(experiment.rollouts.denoising_steps)
        if self.top_k > most:
            without = "" if self.last else " without the last ('last: true' would add it)"
            yield f"'top_k' is {self.top_k}, but a trajectory has {most} steps{without}; at most {most}"


def same_steps(signals: Signals, steps: slice | list[int]) -> BoolArray:  # (P, T)
    """The same steps for every prompt; `steps` indexes the T steps."""
    chosen = np.zeros((signals.num_prompts, signals.num_steps), dtype=np.bool_)
    chosen[:, steps] = True
    return chosen


def highest(scores: FloatArray, count: int, eligible: int, min_gap: int = 1) -> BoolArray:  # (P, T)
    """The `count` highest of the first `eligible` scores of each row, `min_gap` apart; earlier steps win ties."""
    chosen = np.zeros(scores.shape, dtype=np.bool_)
    for row, curve in enumerate(scores):
        free = np.ones(eligible, dtype=np.bool_)
        for step in np.argsort(-curve[:eligible], kind="stable"):
            if free[step]:
                chosen[row, step] = True
                free[max(0, step - min_gap + 1) : step + min_gap] = False
            if chosen[row].sum() == count:
                break
        assert chosen[row].sum() == count, "checked at load"
    return chosen


class UniformSelector(Selector):
    """Every denoising step (Flow-GRPO)."""

    kind: Literal["uniform"] = "uniform"

    def select(self, signals: Signals, rng: np.random.Generator) -> BoolArray:  # (P, T)
        """True everywhere, but for the last step unless `last`."""
        return same_steps(signals, slice(self.eligible(signals.num_steps)))


class RandomSelector(CountedSelector):
    """As many denoising steps as the entropy-peak selector chooses, drawn at random: its control at equal cost."""

    kind: Literal["random"] = "random"

    def select(self, signals: Signals, rng: np.random.Generator) -> BoolArray:  # (P, T)
        """`top_k` steps a prompt, drawn anew for every prompt and training step."""
        scores = rng.random((signals.num_prompts, signals.num_steps))
        return highest(scores, self.top_k, self.eligible(signals.num_steps))


class FractionSelector(Selector):
    """A random share of the denoising steps (DanceGRPO: 0.6 of all but the last, 9 of 16).

    Deviation: the steps are drawn for each prompt and training step; DanceGRPO draws them for each rollout. With
    `tree: {kind: independent, noise: all}` every step is noisy and only the drawn ones are trained, as there.
    """

    kind: Literal["fraction"] = "fraction"
    fraction: float = Field(0.6, gt=0, le=1, description="share of the steps, rounded down (DanceGRPO: 0.6)")

    def count(self, steps: int) -> int:
        """How many of `steps` denoising steps are chosen."""
        return math.floor(self.fraction * self.eligible(steps) + 1e-9)  # 0.6 x 15 is 9

    def select(self, signals: Signals, rng: np.random.Generator) -> BoolArray:  # (P, T)
        """The share of the steps, drawn anew for every prompt and training step."""
        scores = rng.random((signals.num_prompts, signals.num_steps))
        return highest(scores, self.count(signals.num_steps), self.eligible(signals.num_steps))

    def problems(self, experiment: Experiment) -> Iterator[str]:
        """At least one step."""
        steps = experiment.rollouts.denoising_steps
        if self.count(steps) == 0:
            least = math.ceil(100 / self.eligible(steps)) / 100
            yield (
                f"'fraction' {self.fraction:g} of {self.eligible(steps)} steps is less than one step; "
                f"at least {least:g}"
            )


class FixedSelector(SelectorSpec):
    """The named denoising steps, for every prompt and training step: the control that looks at nothing."""

    kind: Literal["fixed"] = "fixed"
    steps: tuple[int, ...] = Field((0, 3, 6, 9), min_length=1, description="from 0 (BranchGRPO splits at 0, 3, 6, 9)")

    def select(self, signals: Signals, rng: np.random.Generator) -> BoolArray:  # (P, T)
        """True at the named steps."""
        return same_steps(signals, list(self.steps))

    def problems(self, experiment: Experiment) -> Iterator[str]:
        """Steps that exist, each once."""
        yield from misplaced("steps", self.steps, experiment.rollouts.denoising_steps)


class FirstSelector(CountedSelector):
    """The first denoising steps: the control that explores early, whatever entropy says."""

    kind: Literal["first"] = "first"

    def select(self, signals: Signals, rng: np.random.Generator) -> BoolArray:  # (P, T)
        """Steps 0 .. top_k - 1."""
        return same_steps(signals, slice(self.top_k))


class TopStdSelector(CountedSelector):
    """The steps at which the run's sampler adds the most noise: the control that explores where noise does."""

    kind: Literal["top-std"] = "top-std"

    @property
    def reads(self) -> tuple[str, ...]:
        """The std of the sampler's noise at each step."""
        return (STEP_NOISE,)

    def select(self, signals: Signals, rng: np.random.Generator) -> BoolArray:  # (P, T)
        """The `top_k` highest transition stds of the schedule; earlier steps win ties."""
        return highest(signals.by_step(STEP_NOISE), self.top_k, self.eligible(signals.num_steps))


def misplaced(field: str, steps: tuple[int, ...], denoising_steps: int) -> Iterator[str]:
    """What is wrong with named denoising steps."""
    outside = [step for step in steps if not 0 <= step < denoising_steps]
    if outside:
        yield f"'{field}' names step {outside[0]}, but a trajectory has the steps 0 to {denoising_steps - 1}"
    if list(steps) != sorted(set(steps)):
        yield f"'{field}' must rise, each step once, not {list(steps)}; {sorted(set(steps))} would"
