"""What advantages share: from values of rollouts or nodes to the credit of trained edges."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from aegpo.core.parts import AdvantageSpec
from aegpo.core.records import RolloutPlan, Rollouts

if TYPE_CHECKING:
    from torch import Tensor


class CombiningAdvantage(AdvantageSpec):
    """What advantages over several rewards share: summing scores, or normalising each first."""

    combine: Literal["sum", "per-reward"] = Field(
        "sum",
        description="weighted scores are summed, then normalised; or each reward is normalised, then summed by weight "
        "(MixGRPO's advantage_aggr, whose weights are divided by their sum: give weights that sum to 1; GDPO)",
    )

    def estimate(self, rewards: Tensor, weights: Tensor, rollouts: Rollouts) -> Tensor:  # (E,)
        """(N, R) scores, (R,) weights -> the credit of each trained edge."""
        import torch

        scores = rewards.double() * weights.double()
        if self.combine == "sum":
            return self.finished(self.normalised(scores.sum(dim=1), rollouts), rollouts)
        each = [self.normalised(score, rollouts) for score in rewards.double().unbind(dim=1)]
        levels = zip(*each, strict=True)  # a node's advantages under every reward; weights count afterwards
        return self.finished([torch.stack(level, dim=1) @ weights.double() for level in levels], rollouts)

    def normalised(self, score: Tensor, rollouts: Rollouts) -> list[Tensor]:  # T+1 tensors (N_i,)
        """(N,) scores -> the advantage of every node."""
        raise NotImplementedError(f"advantage {self.kind!r} does not define normalised(score, rollouts)")

    def finished(self, values: list[Tensor], rollouts: Rollouts) -> Tensor:  # (E,)
        """Advantages of every node -> the credit of each trained edge."""
        raise NotImplementedError(f"advantage {self.kind!r} does not define finished(values, rollouts)")


def deviations(score: Tensor, group: Tensor, unbiased: bool) -> Tensor:  # (N,)
    """The std of each value's group."""
    import torch

    found = score.new_zeros(int(group.max()) + 1)
    for which in torch.unique(group):
        found[which] = score[group == which].std(correction=int(unbiased))
    return found[group]


def centred(score: Tensor, group: Tensor) -> Tensor:  # (N,)
    """Each value minus its group's mean."""
    size = int(group.max()) + 1
    total = score.new_zeros(size).index_add(0, group, score)
    members = score.new_zeros(size).index_add(0, group, score.new_ones(len(score)))
    return score - (total / members)[group]


def trained(values: list[Tensor], plan: RolloutPlan) -> Tensor:  # (E,) float32
    """The values of trained edges' children, level by level, from values of every node."""
    import torch

    chosen = [value[torch.from_numpy(mask)] for value, mask in zip(values[1:], plan.trained, strict=True)]
    return torch.cat(chosen).float()


def average_up(leaf_values: Tensor, plan: RolloutPlan) -> list[Tensor]:  # T+1 tensors (N_i,)
    """The mean over the leaves below each node."""
    import torch

    sums = [leaf_values]
    for level in reversed(range(plan.num_steps)):
        parent = torch.from_numpy(plan.parent[level]).to(leaf_values.device)
        sums.append(leaf_values.new_zeros(len(plan.prompt[level])).index_add(0, parent, sums[-1]))
    counts = (torch.from_numpy(count).to(leaf_values.device) for count in plan.leaves)
    return [total / count for total, count in zip(reversed(sums), counts, strict=True)]


def clamped(values: Tensor, limit: float | None) -> Tensor:
    """Values cut off at +- the limit, if there is one."""
    return values if limit is None else values.clamp(-limit, limit)
