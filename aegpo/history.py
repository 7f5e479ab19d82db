"""What a run remembers of its prompts' rewards, for parts that decide by them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from aegpo.records import FloatArray, Prompt

if TYPE_CHECKING:
    from torch import Tensor


class RewardHistory:
    """The variance of each prompt's rewards within its groups: the mean over its visits."""

    def __init__(self) -> None:
        self._variances: dict[int, tuple[int, float]] = {}  # prompt -> visits, mean of their variances

    def add(self, prompts: Sequence[Prompt], rewards: Tensor, group: np.ndarray) -> None:  # (N,), (N,)
        """Remembers a training step's weighted rewards; `group` is the row of `prompts` each belongs to."""
        values = rewards.double().cpu().numpy()
        for row, prompt in enumerate(prompts):
            visits, mean = self._variances.get(prompt.index, (0, 0.0))
            variance = float(values[group == row].var(ddof=1))
            self._variances[prompt.index] = (visits + 1, mean + (variance - mean) / (visits + 1))

    def std(self, prompts: Sequence[Prompt]) -> FloatArray:  # (P,)
        """What is known of each prompt; NaN where it was not seen yet."""
        return np.sqrt([self._variances.get(prompt.index, (0, np.nan))[1] for prompt in prompts])

    def state_dict(self) -> dict[str, Any]:
        """Visits and variances by prompt."""
        return {"variances": {str(prompt): list(known) for prompt, known in self._variances.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` returned; checkpoints of older versions have none."""
        found = state.get("variances", {})
        self._variances = {int(prompt): (int(visits), float(mean)) for prompt, (visits, mean) in found.items()}
