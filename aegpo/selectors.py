"""At which denoising steps trajectories explore and learn."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from aegpo.interfaces import BoolArray, FloatArray, Signals
from aegpo.specs import Experiment, SelectorSpec


class _Selector(SelectorSpec):
    """What every selector shares: whether the last denoising step may be chosen."""

    last: bool = Field(
        False, description="the last step may be chosen; its noise stays in the image (Flow-GRPO trains the first T-1)"
    )

    def eligible(self, signals: Signals) -> int:
        """Steps 0 .. eligible-1 may be chosen."""
        return signals.num_steps - (0 if self.last else 1)


class _CountedSelector(_Selector):
    """What selectors of a fixed number of steps share: `top_k` must be available."""

    top_k: int = Field(4, ge=1, description="denoising steps chosen for each prompt (AEGPO, Sec. 4.2)")

    def problems(self, experiment: Experiment) -> Iterator[str]:
        """No more steps than there are."""
        steps = experiment.rollouts.denoising_steps
        most = steps - (0 if self.last else 1)
        if self.top_k > most:
            without = "" if self.last else " without the last ('last: true' would add it)"
            yield f"'top_k' is {self.top_k}, but a trajectory has {most} steps{without}; at most {most}"


class UniformSelector(_Selector):
    """Every denoising step (Flow-GRPO)."""

    kind: Literal["uniform"] = "uniform"

    def select(self, signals: Signals, rng: np.random.Generator) -> BoolArray:  # (P, T)
        """True everywhere, but for the last step unless `last`."""
        chosen = np.zeros((signals.num_prompts, signals.num_steps), dtype=np.bool_)
        chosen[:, : self.eligible(signals)] = True
        return chosen


class RandomSelector(_CountedSelector):
    """As many denoising steps as the entropy-peak selector chooses, drawn at random: its control at equal cost."""

    kind: Literal["random"] = "random"

    def select(self, signals: Signals, rng: np.random.Generator) -> BoolArray:  # (P, T)
        """`top_k` steps a prompt, drawn anew for every prompt and training step."""
        scores = rng.random((signals.num_prompts, signals.num_steps))
        return _top(scores, self.top_k, self.eligible(signals))


class EntropyPeakSelector(_CountedSelector):
    """The steps at which attention entropy peaks over the trajectory (AEGPO, Sec. 4.2)."""

    kind: Literal["entropy-peak"] = "entropy-peak"
    needs_entropy: ClassVar[bool] = True
    scope: Literal["prompt", "batch"] = Field(
        "prompt", description="peaks of each prompt's own curve, or of the mean curve (our choice: prompt)"
    )
    local_maxima: bool = Field(
        False, description="local maxima first, then the highest other steps (our choice: plain top-K)"
    )
    min_gap: int = Field(1, ge=1, description="least distance between chosen steps; 1: neighbours are allowed")

    def select(self, signals: Signals, rng: np.random.Generator) -> BoolArray:  # (P, T)
        """The `top_k` highest entropies of the policy among the measured steps; earlier steps win ties."""
        assert signals.entropy is not None, "needs_entropy"
        measured, curves = signals.measured, signals.entropy
        if self.scope == "batch":
            curves = np.broadcast_to(curves.mean(axis=0), curves.shape)
        eligible = self.eligible(signals)
        if self.local_maxima:
            steps = measured[measured < eligible]  # neighbours are the nearest steps that were measured
            curves = curves.copy()
            curves[:, steps] = _raise_local_maxima(curves[:, steps])
        curves = np.where(np.isnan(curves), -np.inf, curves)
        return _top(curves, self.top_k, eligible, self.min_gap)

    def problems(self, experiment: Experiment) -> Iterator[str]:
        """No more steps than are measured, at the asked distance."""
        yield from super().problems(experiment)
        end = experiment.rollouts.denoising_steps - (0 if self.last else 1)
        steps = len({step for step in experiment.probe.measured(end) if step < end})
        if experiment.probe.steps != "all" and self.top_k > steps:
            yield f"'top_k' is {self.top_k}, but 'probe.steps' measures {steps} that may be chosen; at most {steps}"
            return
        span = (2 * self.min_gap - 1) * (self.top_k - 1) + 1
        if self.min_gap > 1 and span > steps:
            most = (steps - 1) // (2 * self.min_gap - 1) + 1
            yield (
                f"{self.top_k} steps at least {self.min_gap} apart may not fit in {steps}, whatever the entropies; "
                f"'top_k' of at most {most} always does"
            )


def _top(scores: FloatArray, count: int, eligible: int, min_gap: int = 1) -> BoolArray:  # (P, T)
    """The `count` highest of the first `eligible` scores of each row, `min_gap` apart."""
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


def _raise_local_maxima(curves: FloatArray) -> FloatArray:  # (P, measured)
    """Lifts interior and boundary local maxima above everything else, keeping the order within both classes."""
    padded = np.pad(curves, ((0, 0), (1, 1)), constant_values=-np.inf)
    peak = (padded[:, 1:-1] > padded[:, :-2]) & (padded[:, 1:-1] >= padded[:, 2:])
    lifted: FloatArray = curves + peak * (np.ptp(curves) + 1.0)
    return lifted
