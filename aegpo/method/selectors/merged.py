"""A run of steps that is taken as one: E-GRPO's jump."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
from pydantic import Field

from aegpo.core.experiment import Experiment
from aegpo.core.parts import SelectorSpec
from aegpo.core.records import BoolArray, IntArray
from aegpo.core.signals import Signals
from aegpo.method.selectors.plain import same_steps


class MergedSelector(SelectorSpec):
    """A run of steps joined into one large step, which alone explores and learns (E-GRPO, arXiv 2601.00423).

    The large step goes from level `start` to level `start + length` by one velocity and at the noise rate of its first
    level, so it is the step that the sampler takes on the coarser schedule; other steps stay as they are. With
    `tree: trunk` it is E-GRPO's: children at one state of a deterministic trunk, then the ODE. Its code has a list of
    such starts and lengths, and a group for each; a run here has one, so that arms compare them.

    Deviations: after a jump of several levels the published ODE goes on from level `start + 1`, as if nothing had been
    joined; here from the level that was reached. At sigma 1 its noise rate is that of a step to the next level; here,
    as for any step of `flow-sde`, that of the step that is taken.
    """

    kind: Literal["merged"] = "merged"
    start: int = Field(1, ge=0, le=1000, description="the first step of the run, from 0 (E-GRPO's code: 1)")
    length: int = Field(
        2,
        ge=2,
        le=1000,
        description="how many steps are joined (E-GRPO merges steps of low entropy; its script, of 16: none)",
    )

    def select(self, signals: Signals, rng: np.random.Generator) -> BoolArray:  # (P, T)
        """True at the first step of the run."""
        return same_steps(signals, [self.start])

    def merge(self, selected: BoolArray) -> IntArray:  # (P, T)
        """The steps of the run end where it does, all others at the next level."""
        until = np.tile(np.arange(1, selected.shape[1] + 1, dtype=np.int64), (len(selected), 1))
        until[:, self.start : self.start + self.length] = self.start + self.length
        return until

    def problems(self, experiment: Experiment) -> Iterator[str]:
        """A run inside the trajectory."""
        steps = experiment.rollouts.denoising_steps
        if self.start + self.length > steps:
            fits = f"'length' of at most {steps - self.start}" if steps - self.start >= 2 else "an earlier 'start'"
            yield (f"{self.length} steps from step {self.start} on do not fit in a trajectory of {steps}; {fits} would")
