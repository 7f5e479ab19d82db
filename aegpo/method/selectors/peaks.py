"""Steps at which a signal peaks: attention entropy as AEGPO has it, any other, and the control upside down."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
from pydantic import Field

from aegpo.core.experiment import Experiment
from aegpo.core.records import BoolArray, FloatArray
from aegpo.core.signals import Signals
from aegpo.method.selectors.plain import CountedSelector, highest
from aegpo.method.signals.entropy_options import ENTROPY


class _SignalSelector(CountedSelector):
    """What all share: which signal's curve counts, and whose."""

    scope: Literal["prompt", "batch"] = Field(
        "prompt", description="peaks of each prompt's own curve, or of the mean curve (our choice: prompt)"
    )

    @property
    def reads(self) -> tuple[str, ...]:
        """The attention entropy of each prompt at each step."""
        return (ENTROPY,)

    def curves(self, signals: Signals) -> FloatArray:  # (P, T)
        """The values that decide; NaN at steps that were not measured."""
        curves = signals.by_step(self.reads[0])
        return np.broadcast_to(curves.mean(axis=0), curves.shape) if self.scope == "batch" else curves

    def available(self, experiment: Experiment) -> int:
        """How many of the steps that may be chosen are measured."""
        steps = experiment.rollouts.denoising_steps
        source, end = experiment.source(self.reads[0]), self.eligible(steps)
        return end if source is None else len({step for step in source.measured(steps) if step < end})

    def problems(self, experiment: Experiment) -> Iterator[str]:
        """A signal of steps, and no more of these than are measured."""
        yield from super().problems(experiment)
        (name,), steps = self.reads, self.available(experiment)
        source = experiment.source(name)
        if source is not None and source.provides[name] == "prompt":
            yield f"signal {name!r} has values by prompt; a choice of steps needs them by step or prompt-step"
        elif steps < self.eligible(experiment.rollouts.denoising_steps) and self.top_k > steps:
            many = f"{name!r} is measured at {steps} steps that may be chosen"
            yield f"'top_k' is {self.top_k}, but {many}; at most {steps}"


class _PeakSelector(_SignalSelector):
    """The highest steps of a signal."""

    local_maxima: bool = Field(
        False, description="local maxima first, then the highest other steps (our choice: plain top-K)"
    )
    min_gap: int = Field(1, ge=1, le=1000, description="least distance between chosen steps; 1: neighbours are allowed")

    def select(self, signals: Signals, rng: np.random.Generator) -> BoolArray:  # (P, T)
        """The `top_k` highest values of the signal among the measured steps; earlier steps win ties."""
        measured, curves = signals.measured(self.reads[0]), self.curves(signals)
        eligible = self.eligible(signals.num_steps)
        if self.local_maxima:
            curves = curves.copy()  # neighbours are the nearest measured steps, the last one too, which is never chosen
            curves[:, measured] = _raise_local_maxima(curves[:, measured])
        return highest(_measured_first(curves), self.top_k, eligible, self.min_gap)

    def problems(self, experiment: Experiment) -> Iterator[str]:
        """No more steps than are measured, at the asked distance."""
        yield from super().problems(experiment)
        steps = self.available(experiment)
        span = (2 * self.min_gap - 1) * (self.top_k - 1) + 1
        if self.min_gap > 1 and self.top_k <= steps < span:
            most = (steps - 1) // (2 * self.min_gap - 1) + 1
            yield (
                f"{self.top_k} steps at least {self.min_gap} apart may not fit in {steps}, whatever the values; "
                f"'top_k' of at most {most} always does"
            )


class PeaksSelector(_PeakSelector):
    """The steps at which any signal peaks over the trajectory: AEGPO's rule with a signal of your choice."""

    kind: Literal["peaks"] = "peaks"
    signal: str = Field(description="the signal whose peaks are chosen, such as entropy or step-noise")

    @property
    def reads(self) -> tuple[str, ...]:
        """The signal it is told to read."""
        return (self.signal,)


class EntropyPeakSelector(_PeakSelector):
    """The steps at which attention entropy peaks over the trajectory (AEGPO, Sec. 4.2): `peaks` of `entropy`."""

    kind: Literal["entropy-peak"] = "entropy-peak"


class LowestEntropySelector(_SignalSelector):
    """The steps of lowest attention entropy: the control that turns AEGPO's choice upside down, at equal cost."""

    kind: Literal["lowest-entropy"] = "lowest-entropy"

    def select(self, signals: Signals, rng: np.random.Generator) -> BoolArray:  # (P, T)
        """The `top_k` lowest entropies of the policy among the measured steps; earlier steps win ties."""
        return highest(_measured_first(-self.curves(signals)), self.top_k, self.eligible(signals.num_steps))


def _measured_first(scores: FloatArray) -> FloatArray:  # (P, T)
    """Steps that were not measured come last."""
    return np.where(np.isnan(scores), -np.inf, scores)


def _raise_local_maxima(curves: FloatArray) -> FloatArray:  # (P, measured)
    """Lifts interior and boundary local maxima above everything else, keeping the order within both classes."""
    padded = np.pad(curves, ((0, 0), (1, 1)), constant_values=-np.inf)
    peak = (padded[:, 1:-1] > padded[:, :-2]) & (padded[:, 1:-1] >= padded[:, 2:])
    lifted: FloatArray = curves + peak * (np.ptp(curves) + 1.0)
    return lifted
