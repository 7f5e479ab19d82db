"""Which prompts of the list a training step asks: rules over the whole list, before anything is allocated."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
from pydantic import Field

from aegpo.core.experiment import Experiment
from aegpo.core.parts import CurriculumSpec
from aegpo.core.records import BoolArray, FloatArray, IntArray
from aegpo.core.signals import Signals

_SHUFFLE = 7919  # keeps the stream of shuffles apart from the stream of decisions
_MEAN = "reward-mean"  # of a prompt's rewards so far


class ShuffleCurriculum(CurriculumSpec):
    """Every prompt once before any comes again, in an order that is drawn anew each time (all published baselines)."""

    kind: Literal["shuffle"] = "shuffle"

    def build(self, prompts: int, per_step: int, seed: int) -> Shuffle:
        """The order of so many prompts."""
        return Shuffle(prompts, per_step, seed)


class Shuffle:
    """Prompts in epochs: a pure function of (seed, step), so a resumed run goes on where it was."""

    def __init__(self, prompts: int, per_step: int, seed: int) -> None:
        self._prompts, self._per_step, self._seed = prompts, per_step, seed
        self._last: tuple[int, IntArray] | None = None  # the epoch asked for last, and its order

    def candidates(self, steps: int) -> IntArray:
        """Those that steps 1 to `steps` have, as they come: of a long list and a short run, a small part."""
        if steps * self._per_step >= self._prompts:
            return np.arange(self._prompts, dtype=np.int64)
        return np.concatenate([self.at(step) for step in range(1, steps + 1)])

    def choose(self, known: Signals, count: int, rng: np.random.Generator) -> IntArray:  # (count,)
        """The prompts of the step."""
        return self.at(known.step)

    def at(self, step: int) -> IntArray:
        """The prompts of a training step, counted from 1."""
        first = (step - 1) * self._per_step
        return np.array([self._nth(place) for place in range(first, first + self._per_step)], dtype=np.int64)

    def _nth(self, position: int) -> int:
        epoch, place = divmod(position, self._prompts)
        if self._last is None or self._last[0] != epoch:
            rng = np.random.default_rng((_SHUFFLE, self._seed, epoch))
            self._last = epoch, rng.permutation(self._prompts)
        return int(self._last[1][place])


class BoundaryCurriculum(CurriculumSpec):
    """Prompts at the boundary of what the policy can do: their mean reward so far lies between `low` and `high`.

    A prompt that always succeeds, or never, has groups without a spread and teaches nothing. A share of each step are
    prompts that were not asked yet; where the boundary has too few, more of these, and then those nearest to it. Every
    draw is of (seed, step). The bounds are in units of the weighted reward: our choices are for rewards in [0, 1].
    """

    kind: Literal["boundary"] = "boundary"
    low: float = Field(0.1, ge=-1e9, le=1e9, description="least mean reward of the boundary (our choice)")
    high: float = Field(0.9, ge=-1e9, le=1e9, description="greatest mean reward of the boundary (our choice)")
    unseen: float = Field(0.25, ge=0, le=1, description="share of a step's prompts that are new (our choice)")

    @property
    def reads(self) -> tuple[str, ...]:
        """The mean of each prompt's rewards so far."""
        return (_MEAN,)

    def problems(self, experiment: Experiment) -> Iterator[str]:
        """Bounds with something between them."""
        if self.high < self.low:
            yield f"'high' ({self.high:g}) is below 'low' ({self.low:g})"

    def build(self, prompts: int, per_step: int, seed: int) -> Boundary:
        """The rule for so many prompts."""
        return Boundary(self, prompts)


class Boundary:
    """A pure function of what is known and the generator of the step."""

    def __init__(self, spec: BoundaryCurriculum, prompts: int) -> None:
        self._spec, self._prompts = spec, prompts

    def candidates(self, steps: int) -> IntArray:
        """All: which ones it asks depends on rewards."""
        return np.arange(self._prompts, dtype=np.int64)

    def choose(self, known: Signals, count: int, rng: np.random.Generator) -> IntArray:  # (count,)
        """New prompts, then those of the boundary, then more new ones, then the nearest to the boundary."""
        mean = known.by_prompt(_MEAN)
        order = rng.permutation(len(mean))
        new = order[np.isnan(mean[order])]
        within = order[self._within(mean[order])]
        share = min(round(self._spec.unseen * count), len(new))
        chosen = [*new[:share], *within[: count - share]]
        chosen += [*new[share : share + count - len(chosen)]]
        outside = order[~np.isnan(mean[order]) & ~self._within(mean[order])]
        nearest = outside[np.argsort(self._distance(mean[outside]), kind="stable")]
        return np.array([*chosen, *nearest[: count - len(chosen)]], dtype=np.int64)

    def _within(self, mean: FloatArray) -> BoolArray:
        within: BoolArray = (mean >= self._spec.low) & (mean <= self._spec.high)
        return within

    def _distance(self, mean: FloatArray) -> FloatArray:
        distance: FloatArray = np.maximum(self._spec.low - mean, mean - self._spec.high)
        return distance
