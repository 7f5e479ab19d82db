"""What a run remembers of its prompts' rewards, for parts that decide by them. It costs nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from aegpo.core.experiment import Experiment
from aegpo.core.interfaces import Policy
from aegpo.core.parts import SignalSpec
from aegpo.core.records import FloatArray, IntArray, Per, Prompt
from aegpo.core.signals import Measurement

if TYPE_CHECKING:
    from torch import Tensor

LEAST = 2  # rewards that have a spread
REWARD_MEAN, REWARD_STD = "reward-mean", "reward-std"


class RewardSignal(SignalSpec):
    """Mean and spread of each prompt's weighted rewards so far, over its visits; unknown until it was asked."""

    kind: Literal["reward-statistics"] = "reward-statistics"
    provides: ClassVar[Mapping[str, Per]] = {REWARD_MEAN: "prompt", REWARD_STD: "prompt"}
    of_list: ClassVar[bool] = True

    def build(self, experiment: Experiment) -> RewardHistory:
        """A memory with nothing in it."""
        return RewardHistory()


class RewardHistory:
    """Mean and variance of each prompt's rewards within its groups: the means over its visits."""

    def __init__(self) -> None:
        self._known: dict[
            int, tuple[int, float, float]
        ] = {}  # prompt -> visits, mean of their variances, of their means

    def measure(self, step: int, prompts: Sequence[Prompt], policy: Policy) -> Measurement:
        """`reward-mean` and `reward-std` (P,); NaN where a prompt was not seen yet."""
        return Measurement({REWARD_MEAN: self.mean(prompts), REWARD_STD: self.std(prompts)})

    def rewarded(self, prompts: Sequence[Prompt], rewards: Tensor, group: IntArray) -> None:  # (N,), (N,)
        """Remembers a training step's weighted rewards; `group` is the row of `prompts` each belongs to."""
        values = rewards.double().cpu().numpy()
        for row in np.unique(group).tolist():
            prompt = prompts[row]
            visits, variance, mean = self._known.get(prompt.index, (0, 0.0, 0.0))
            own, visits = values[group == row], visits + 1
            if (own == own[0]).all():  # a mean and a spread that do not round
                own = own[:1].repeat(LEAST)
            variance += (float(own.var(ddof=1)) - variance) / visits
            self._known[prompt.index] = (visits, variance, mean + (float(own.mean()) - mean) / visits)

    def std(self, prompts: Sequence[Prompt]) -> FloatArray:  # (P,)
        """The spread of each prompt's rewards; NaN where it was not seen yet."""
        return np.sqrt([self._known[prompt.index][1] if prompt.index in self._known else np.nan for prompt in prompts])

    def mean(self, prompts: Sequence[Prompt]) -> FloatArray:  # (P,)
        """The mean of each prompt's rewards; NaN where it was not seen yet."""
        return np.array([self._known[prompt.index][2] if prompt.index in self._known else np.nan for prompt in prompts])

    def state_dict(self) -> dict[str, Any]:
        """Visits, variances and means by prompt."""
        return {
            "variances": {str(prompt): [visits, variance] for prompt, (visits, variance, _) in self._known.items()},
            "means": {str(prompt): mean for prompt, (_, _, mean) in self._known.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` returned; checkpoints of older versions have no means, or nothing."""
        found, means = state.get("variances", {}), state.get("means", {})
        self._known = {
            int(prompt): (int(visits), float(variance), float(means.get(prompt, np.nan)))
            for prompt, (visits, variance) in found.items()
        }
