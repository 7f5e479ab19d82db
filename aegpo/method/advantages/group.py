"""Credit within a prompt's group of rollouts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from aegpo.core.experiment import Experiment
from aegpo.core.records import Rollouts
from aegpo.core.registry import Where
from aegpo.method.advantages.credit import CombiningAdvantage, Judged, average_up, centred, clamped, deviations, trained

if TYPE_CHECKING:
    from torch import Tensor


class GroupAdvantage(CombiningAdvantage):
    """A rollout's reward against the mean of its prompt's group (GRPO).

    An edge that several rollouts pass through gets the mean of their advantages. `best_of` keeps the best and the worst
    rollouts by advantage and gives the others none (DanceGRPO's best-of-n); with `optimizer.drop_zero_credit` they are
    left out of the update. DanceGRPO picks over the whole batch, so that a prompt may lose all rollouts of one sign;
    `best_of_scope: prompt` picks within each prompt.
    """

    kind: Literal["group"] = "group"
    read_where: ClassVar[Mapping[str, Where]] = {
        **dict.fromkeys(("unbiased", "epsilon"), Where("std", ("none",), other=True)),
        "best_of_scope": Where("best_of", (None,), other=True),
    }
    std: Literal["none", "group", "batch"] = Field(
        "group", description="divide by the group's std (DanceGRPO), the batch's (Flow-GRPO), or not (Dr. GRPO)"
    )
    unbiased: bool = Field(True, description="divide by n-1 in the std (DanceGRPO) or by n (Flow-GRPO)")
    epsilon: float = Field(1e-4, gt=0, le=1, description="added to the std (Flow-GRPO 1e-4, DanceGRPO 1e-8)")
    clip: float | None = Field(5.0, gt=0, le=1e6, description="advantages are cut off at +- this; null: never (all: 5)")
    best_of: int | None = Field(
        None,
        ge=2,
        le=65536,
        multiple_of=2,
        description="rollouts that get credit, half best, half worst; null: all of them",
    )
    best_of_scope: Literal["batch", "prompt"] = Field(
        "batch", description="`best_of` rollouts of the whole step (DanceGRPO's Hunyuan script), or of each prompt"
    )

    def normalised(self, score: Judged, rollouts: Rollouts) -> list[Tensor]:  # one tensor (N,)
        """Scores -> the advantage of every rollout."""
        import torch

        values = score.leaves
        group = torch.from_numpy(rollouts.plan.group).to(values.device)
        advantage = centred(values, group)
        if self.std == "none":
            return [advantage]
        spread = (
            values.std(correction=int(self.unbiased))
            if self.std == "batch"
            else deviations(values, group, self.unbiased)
        )
        return [advantage / (spread + self.epsilon)]

    def finished(self, values: list[Tensor], rollouts: Rollouts) -> Tensor:  # (E,)
        """Advantages of rollouts -> the credit of each trained edge."""
        import torch

        advantage = values[0]
        if self.best_of is not None:
            group = torch.from_numpy(rollouts.plan.group).to(advantage.device)
            group = torch.zeros_like(group) if self.best_of_scope == "batch" else group
            advantage = advantage * _extremes(advantage, group, self.best_of)
        return trained(average_up(clamped(advantage, self.clip), rollouts.plan), rollouts.plan)

    def problems(self, experiment: Experiment) -> Iterator[str]:
        """No more than there are."""
        total = experiment.rollouts.rollouts_per_step
        if self.best_of is not None and self.best_of_scope == "batch" and self.best_of > total:
            yield f"'best_of' keeps {self.best_of} rollouts of a step, but there are {total}; at most {total // 2 * 2}"


def _extremes(values: Tensor, group: Tensor, count: int) -> Tensor:  # (N,) bool
    """The highest and the lowest `count` / 2 of each group; all of a group that is no larger than that."""
    import torch

    kept = torch.zeros_like(group, dtype=torch.bool)
    for which in torch.unique(group):
        rows = (group == which).nonzero().flatten()
        order = rows[values[rows].argsort(stable=True)]
        kept[torch.cat([order[: count // 2], order[-(count // 2) :]])] = True
    return kept
