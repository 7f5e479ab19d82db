"""Neighbouring steps: Flow-GRPO-Fast's random window, MixGRPO's that slides, and BranchGRPO's that is left out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from aegpo.core.experiment import Experiment
from aegpo.core.parts import SelectorSpec
from aegpo.core.records import BoolArray
from aegpo.core.registry import Where
from aegpo.core.signals import Signals
from aegpo.method.selectors.plain import Selector, same_steps


class WindowSelector(Selector):
    """A window of neighbouring steps at a random place (Flow-GRPO-Fast).

    Its start is drawn from low .. high - width for each training step, the same for every prompt. Deviation: the
    published code draws one for each rank and batch, so that a group may mix windows.
    """

    kind: Literal["window"] = "window"
    width: int = Field(3, ge=1, le=1000, description="neighbouring steps (Flow-GRPO-Fast, SD3.5 and FLUX: 3)")
    low: int = Field(0, ge=0, le=1000, description="the first step the window may hold")
    high: int = Field(
        5, ge=1, le=1000, description="the first step it may no longer hold (Flow-GRPO-Fast: T / 2, so 5 of 10)"
    )

    def select(self, signals: Signals, rng: np.random.Generator) -> BoolArray:  # (P, T)
        """The window, at one place for all prompts."""
        start = int(rng.integers(self.low, self.high - self.width + 1))
        return same_steps(signals, slice(start, start + self.width))

    def problems(self, experiment: Experiment) -> Iterator[str]:
        """A window that fits in its range, and a range that fits in the trajectory."""
        most = self.eligible(experiment.rollouts.denoising_steps)
        if self.high > most:
            without = "" if self.last else " without the last ('last: true' would add it)"
            yield f"'high' is {self.high}, but a trajectory has {most} steps{without}; at most {most}"
        if self.width > self.high - self.low:
            yield (
                f"a window of {self.width} does not fit between 'low' {self.low} and 'high' {self.high}; "
                f"'width' of at most {max(self.high - self.low, 0)} does"
            )


class SlidingWindowSelector(SelectorSpec):
    """MixGRPO's window, which moves from the first steps towards the image as training goes on.

    It holds [start, start + width) without the last two steps of the trajectory, as published. How long it stays:
    `progressive` for `interval` training steps; `decay` from `interval` down to `least_interval`, linearly in start /
    (T - 2) and rounded down; `exp-decay` for ceil(interval exp(-decay_rate max(0, start - threshold))). `random` draws
    its start for every training step instead, from 0 .. T - 2 - width.

    Deviations: `random` draws one start for all prompts and ranks (published: one a rank). When nothing is left to
    move to, the window stays at its last place, T - 3, or rolls back to 0; the published one goes on to T - 2, where
    it is empty and its iterations learn nothing.
    """

    kind: Literal["sliding-window"] = "sliding-window"
    read_where: ClassVar[Mapping[str, Where]] = {
        **dict.fromkeys(("interval", "shift", "roll_back"), Where("strategy", ("random",), other=True)),
        "least_interval": Where("strategy", ("decay",)),
        **dict.fromkeys(("threshold", "decay_rate"), Where("strategy", ("exp-decay",))),
    }
    width: int = Field(4, ge=1, le=1000, description="neighbouring steps (MixGRPO: 4)")
    strategy: Literal["progressive", "random", "decay", "exp-decay"] = Field(
        "progressive", description="how the window moves (MixGRPO's scripts: progressive)"
    )
    interval: int = Field(
        25, ge=1, le=1_000_000, description="training steps at one place (MixGRPO: 25; MixGRPO-Flash: 20)"
    )
    shift: int = Field(
        1, ge=0, le=1000, description="how far it moves; 0: it stays at the first steps (MixGRPO: 1; Flash*: 0)"
    )
    roll_back: bool = Field(False, description="start over at the end, or stay there")
    least_interval: int | None = Field(
        None, ge=1, le=1_000_000, description="of `decay`; null: a quarter of `interval`, as MixGRPO"
    )
    threshold: int = Field(13, ge=0, le=1000, description="start from which `exp-decay` hastens (MixGRPO: 13)")
    decay_rate: float = Field(0.1, ge=0, le=100, description="of `exp-decay` (MixGRPO: 0.1)")

    def select(self, signals: Signals, rng: np.random.Generator) -> BoolArray:  # (P, T)
        """The window of this training step, at one place for all prompts."""
        end = signals.num_steps - 2
        if self.strategy == "random":
            start = int(rng.integers(0, end - self.width + 1))
        else:
            start = self.start(signals.step, end)
        return same_steps(signals, slice(start, min(start + self.width, end)))

    def start(self, step: int, end: int) -> int:
        """Where the window is in training step `step`, from 1; `end`: the first step it never holds."""
        if self.shift == 0:
            return 0
        places = range(0, end, self.shift)
        moves = np.cumsum([self._stay(place, end) for place in places])
        before = (step - 1) % int(moves[-1]) if self.roll_back else min(step - 1, int(moves[-1]) - 1)
        return places[int(np.searchsorted(moves, before, side="right"))]

    def _stay(self, start: int, end: int) -> int:
        """Training steps the window stays at `start`."""
        if self.strategy == "decay":
            least = self.least_interval or max(1, self.interval // 4)
            share = start / end
            return max(least, int(self.interval * (1 - share) + least * share))
        if self.strategy == "exp-decay":
            return math.ceil(self.interval * math.exp(-self.decay_rate * max(0, start - self.threshold)))
        return self.interval

    def problems(self, experiment: Experiment) -> Iterator[str]:
        """A window that fits, and intervals that fall."""
        most = experiment.rollouts.denoising_steps - 2
        if self.width > most:
            yield (
                f"a window of {self.width} does not fit in the {most} steps without the last two of a trajectory; "
                f"'width' of at most {most} does" + (", so more 'denoising_steps' are needed" if most < 1 else "")
            )
        if self.least_interval is not None and self.least_interval > self.interval:
            yield f"'least_interval' ({self.least_interval}) is above 'interval' ({self.interval})"


class DepthPrunedSelector(Selector):
    """Every step but a window of pruned ones, which moves towards the noise (BranchGRPO's depth pruning).

    A depth is the level a step arrives at, so step i has depth i + 1. The window holds `width` depths up to `deepest`
    and moves one depth shallower every `interval` training steps, until its shallowest is `stop_depth`. Combine it
    with a tree that splits at fixed steps and is noisy everywhere: `{kind: branching, splits: [0, 3, 6, 9], noise:
    all}`; pruned steps are sampled all the same and only not learned from.
    """

    kind: Literal["depth-pruned"] = "depth-pruned"
    read_where: ClassVar[Mapping[str, Where]] = {"stop_depth": Where("interval", (None,), other=True)}
    width: int = Field(
        4, ge=1, le=1000, description="depths in the window (BranchGRPO's script: 15 to 18, README: 5 depths)"
    )
    deepest: int | None = Field(
        None, ge=1, le=1000, description="deepest pruned depth at first; null: T - 2 (18 of 20)"
    )
    interval: int | None = Field(
        30, ge=1, le=1_000_000, description="training steps between two moves (BranchGRPO: 30); null: never"
    )
    stop_depth: int = Field(
        9, ge=1, le=1000, description="depth the window does not move above (BranchGRPO: the last split, 9)"
    )
    until: int | None = Field(None, ge=1, le=1_000_000, description="last training step with pruning; null: all")

    def window(self, step: int, steps: int) -> range:
        """The pruned denoising steps in training step `step` of a trajectory of `steps`."""
        if self.until is not None and step > self.until:
            return range(0)
        deepest = self.deepest or steps - 2
        shallowest = deepest - self.width + 1
        moved = 0 if self.interval is None else step // self.interval
        first = shallowest - min(moved, max(0, shallowest - self.stop_depth)) - 1
        return range(first, first + self.width)

    def select(self, signals: Signals, rng: np.random.Generator) -> BoolArray:  # (P, T)
        """All steps that may be chosen, without the window."""
        chosen = same_steps(signals, slice(self.eligible(signals.num_steps)))
        chosen[:, list(self.window(signals.step, signals.num_steps))] = False
        return chosen

    def problems(self, experiment: Experiment) -> Iterator[str]:
        """A window inside the trajectory that leaves something to learn from."""
        steps = experiment.rollouts.denoising_steps
        deepest = self.deepest or steps - 2
        if deepest > steps or deepest < self.width:
            yield (
                f"{self.width} depths up to {deepest} are not all between 1 and {steps}; "
                f"'deepest' from {self.width} to {steps} would be"
            )
        elif self.width >= self.eligible(steps):
            yield f"pruning {self.width} of {self.eligible(steps)} steps may leave none to learn from"
