"""From rewards of rollouts to the credit of each trained transition."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from aegpo.interfaces import RolloutPlan, Rollouts
from aegpo.specs import AdvantageSpec

if TYPE_CHECKING:
    from torch import Tensor


class GroupAdvantage(AdvantageSpec):
    """A rollout's reward against the mean of its prompt's group (GRPO).

    An edge that several rollouts pass through gets the mean of their advantages.
    """

    kind: Literal["group"] = "group"
    std: Literal["none", "group", "batch"] = Field(
        "group", description="divide by the group's std (DanceGRPO), the batch's (Flow-GRPO), or not (Dr. GRPO)"
    )
    unbiased: bool = Field(True, description="divide by n-1 in the std (DanceGRPO) or by n (Flow-GRPO)")
    epsilon: float = Field(1e-4, gt=0, description="added to the std (Flow-GRPO 1e-4, DanceGRPO 1e-8)")
    clip: float | None = Field(5.0, gt=0, description="advantages are cut off at +- this; null: never (all: 5)")

    def estimate(self, rewards: Tensor, weights: Tensor, rollouts: Rollouts) -> Tensor:  # (E,)
        """(N, R) scores, (R,) weights -> the credit of each trained edge."""
        import torch

        score = (rewards.double() * weights.double()).sum(dim=1)
        group = torch.from_numpy(rollouts.plan.group).to(score.device)
        advantage = _centred(score, group, rollouts.plan)
        if self.std != "none":
            advantage = advantage / (self._deviation(score, group) + self.epsilon)
        values = _average_up(_clamped(advantage, self.clip), rollouts.plan)
        return trained(values, rollouts.plan)

    def _deviation(self, score: Tensor, group: Tensor) -> Tensor:  # (N,) or scalar
        import torch

        if self.std == "batch":
            return score.std(correction=int(self.unbiased))
        deviation = score.new_zeros(int(group.max()) + 1)
        for prompt in torch.unique(group):
            deviation[prompt] = score[group == prompt].std(correction=int(self.unbiased))
        return deviation[group]


class DepthAdvantage(AdvantageSpec):
    """A node's value against the other nodes of its prompt at the same depth (BranchGRPO).

    A node's value averages the rewards below it; each trained edge gets the normalised value of its child. Depths
    with one node, or with equal values, get zero.
    """

    kind: Literal["depth"] = "depth"
    weighting: Literal["mean", "path"] = Field(
        "mean", description="plain mean of the leaves below, or children weighted by softmax of their log-probability"
    )
    epsilon: float = Field(1e-8, gt=0, description="added to the unbiased std of a depth (BranchGRPO)")
    least_std: float = Field(1e-6, ge=0, description="depths that vary less than this get zero (BranchGRPO)")
    clip: float | None = Field(5.0, gt=0, description="advantages are cut off at +- this; null: never")

    def estimate(self, rewards: Tensor, weights: Tensor, rollouts: Rollouts) -> Tensor:  # (E,)
        """(N, R) scores, (R,) weights -> the credit of each trained edge."""
        score = (rewards.double() * weights.double()).sum(dim=1)
        values = self.node_values(score, rollouts)
        credit = [self._normalised(value, prompt) for value, prompt in zip(values, rollouts.plan.prompt, strict=True)]
        return trained([_clamped(level, self.clip) for level in credit], rollouts.plan)

    def node_values(self, score: Tensor, rollouts: Rollouts) -> list[Tensor]:  # T+1 tensors (N_i,)
        """(N,) leaf scores -> the value of every node."""
        if self.weighting == "mean":
            return _average_up(score, rollouts.plan)
        import torch

        values = [score]
        for level in reversed(range(rollouts.plan.num_steps)):
            parent = torch.from_numpy(rollouts.plan.parent[level]).to(score.device)
            size = len(rollouts.plan.prompt[level])
            log_prob = rollouts.log_prob[level].double()
            highest = log_prob.new_full((size,), -torch.inf).scatter_reduce(0, parent, log_prob, "amax")
            share = (log_prob - highest[parent]).exp()
            total = share.new_zeros(size).index_add(0, parent, share)
            values.append(share.new_zeros(size).index_add(0, parent, share / total[parent] * values[-1]))
        return values[::-1]

    def _normalised(self, value: Tensor, prompt: object) -> Tensor:  # (N_i,)
        import torch

        group = torch.as_tensor(prompt, device=value.device)
        credit = torch.zeros_like(value)
        for which in torch.unique(group):
            rows = group == which
            nodes = value[rows]
            if len(nodes) > 1 and (deviation := nodes.std()) >= self.least_std:
                credit[rows] = (nodes - nodes.mean()) / (deviation + self.epsilon)
        return credit


def trained(values: list[Tensor], plan: RolloutPlan) -> Tensor:  # (E,) float32
    """The values of trained edges' children, level by level, from values of every node."""
    import torch

    chosen = [value[torch.from_numpy(mask)] for value, mask in zip(values[1:], plan.trained, strict=True)]
    return torch.cat(chosen).float()


def _centred(score: Tensor, group: Tensor, plan: RolloutPlan) -> Tensor:  # (N,)
    size = int(group.max()) + 1
    total = score.new_zeros(size).index_add(0, group, score)
    members = score.new_zeros(size).index_add(0, group, score.new_ones(len(score)))
    return score - (total / members)[group]


def _average_up(leaf_values: Tensor, plan: RolloutPlan) -> list[Tensor]:  # T+1 tensors (N_i,)
    """The mean over the leaves below each node."""
    import torch

    sums = [leaf_values]
    for level in reversed(range(plan.num_steps)):
        parent = torch.from_numpy(plan.parent[level]).to(leaf_values.device)
        sums.append(leaf_values.new_zeros(len(plan.prompt[level])).index_add(0, parent, sums[-1]))
    counts = (torch.from_numpy(count).to(leaf_values.device) for count in plan.leaves)
    return [total / count for total, count in zip(reversed(sums), counts, strict=True)]


def _clamped(values: Tensor, limit: float | None) -> Tensor:
    return values if limit is None else values.clamp(-limit, limit)
