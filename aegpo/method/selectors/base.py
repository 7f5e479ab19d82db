"""What selectors share: which denoising steps may be chosen, and choosing the highest of some score."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from pydantic import Field

from aegpo.core.experiment import Experiment
from aegpo.core.parts import SelectorSpec
from aegpo.core.records import BoolArray, FloatArray, Signals


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

    top_k: int = Field(4, ge=1, description="denoising steps chosen for each prompt (AEGPO, Sec. 4.2)")

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
