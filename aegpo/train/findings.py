"""What an optimizer step finds out about itself; it stays on the device until all gradients are there."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from aegpo.core.records import Update
from aegpo.train.asking import Answers
from aegpo.train.execution import Execution
from aegpo.train.tally import Tally

SPREAD = "ratio_spread"  # (ratio - 1)^2; no objective's own metric


class Findings:
    """Metrics of micro-batches, and whether all that parts said is finite; looked at once, for one wait."""

    def __init__(self, how: Execution, objective: str) -> None:
        """`objective`: its name, as messages call it."""
        self.answers, self._objective = Answers(how), objective
        self._names: list[str] = []
        self._sums: list[Tensor] = []  # of each name: its sum, and the weight of what was summed
        self._moved: list[Tensor] = []

    def add(self, weight: Tensor, metrics: Mapping[str, Tensor]) -> None:
        """Metrics (B,) of a micro-batch, the loss among them, and the weight (B,) of each edge."""
        self.answers.loss(self._objective, metrics["loss"])
        count = weight.sum()
        for name, values in metrics.items():
            self._names.append(name)
            self._sums += [(weight * values).sum(), count]
        if "ratio" in metrics:  # taken about 1, where float32 keeps what is left of it
            self._names.append(SPREAD)
            self._sums += [(weight * (metrics["ratio"] - 1).square()).sum(), count]

    def moved(self, update: Update) -> None:
        """How far the policy is from the one that sampled."""
        self._moved.append((update.log_prob - update.old_log_prob).detach().expm1().abs().max())

    def settle(self, tally: Tally, fresh: bool = False) -> None:
        """Looks at all of it.

        Args:
            tally: takes the metrics.
            fresh: the policy is still the one that sampled, so that a distance from it is an error.

        Raises:
            ContractError: if a part said what is not finite.
            AegpoError: if training ruined the network.
        """
        self.answers.verify()
        if not self._sums:
            return
        found = torch.stack([each.double() for each in (*self._sums, *self._moved)]).tolist()
        for name, total, count in zip(self._names, found[: len(self._sums) : 2], found[1::2], strict=False):
            tally.add(name, total, count)
        if fresh and self._moved:
            tally.raise_to("ratio_error", max(found[len(self._sums) :]))
