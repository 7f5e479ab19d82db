"""Credit within the depth of a tree, and within the children of a step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from aegpo.core.records import BoolArray, IntArray, RolloutPlan, Rollouts
from aegpo.core.registry import Where
from aegpo.method.advantages.credit import (
    CombiningAdvantage,
    Judged,
    average_up,
    clamped,
    exact_where_alike,
    of_each_step,
    standardised,
    trained,
)

if TYPE_CHECKING:
    from torch import Tensor


class DepthAdvantage(CombiningAdvantage):
    """A node's value against the other nodes of its prompt at the same depth (BranchGRPO).

    A node's value averages the rewards below it; each trained edge gets the normalised value of its child. Depths
    with one node, or with equal values, get zero.

    `pruning` takes the credit of some edges away that come after a prompt's last split, where every edge of a leaf's
    chain has the same credit (BranchGRPO's width pruning; sampling and rewards stay as they are). `chain-start` is
    its mode 1, "best per branch": it sorts edges of equal credit and so keeps the earliest steps of each chain, not the
    better children. `extremes` is its mode 2: the best and the worst edges of all trees. With
    `optimizer.drop_zero_credit` pruned edges are left out of the update.
    """

    kind: Literal["depth"] = "depth"
    read_where: ClassVar[Mapping[str, Where]] = {"pruning_ratio": Where("pruning", ("none",), other=True)}
    weighting: Literal["mean", "path"] = Field(
        "mean", description="plain mean of the leaves below, or children weighted by softmax of their log-probability"
    )
    epsilon: float = Field(1e-8, gt=0, le=1, description="added to the unbiased std of a depth (BranchGRPO)")
    least_std: float = Field(1e-6, ge=0, le=1e6, description="depths that vary less than this get zero (BranchGRPO)")
    clip: float | None = Field(5.0, gt=0, le=1e6, description="advantages are cut off at +- this; null: never")

    pruning: Literal["none", "chain-start", "extremes"] = Field(
        "none", description="which edges after the last split keep their credit: all, or as BranchGRPO's mode 1 or 2"
    )
    pruning_ratio: float = Field(0.5, gt=0, le=1, description="share of them that keeps it, rounded down (BranchGRPO)")

    def normalised(self, score: Judged, rollouts: Rollouts) -> list[Tensor]:  # T+1 tensors (N_i,)
        """Scores -> the advantage of every node."""
        values = self.node_values(score.leaves, rollouts)
        return [self._level(value, prompt) for value, prompt in zip(values, rollouts.plan.prompt, strict=True)]

    def finished(self, values: list[Tensor], rollouts: Rollouts) -> Tensor:  # (E,)
        """Advantages of nodes -> the credit of each trained edge."""
        credit = trained([clamped(level, self.clip) for level in values], rollouts.plan)
        return credit if self.pruning == "none" else credit * self._kept(credit, rollouts.plan)

    def _kept(self, credit: Tensor, plan: RolloutPlan) -> Tensor:  # (E,) bool
        import torch

        late = torch.from_numpy(after_last_split(plan)).to(credit.device)
        kept = ~late
        rows = late.nonzero().flatten()
        if self.pruning == "extremes":
            count = max(2, int(len(rows) * self.pruning_ratio))
            order = rows[credit[rows].argsort(descending=True, stable=True)]
            kept[torch.cat([order[: count // 2], order[max(0, len(order) - (count - count // 2)) :]])] = True
            return kept
        owner = torch.from_numpy(_owners(plan)).to(credit.device)
        for leaf in torch.unique(owner[rows]):
            chain = rows[owner[rows] == leaf]  # edges are in the order of levels
            kept[chain[: max(1, int(len(chain) * self.pruning_ratio))]] = True
        return kept

    def node_values(self, score: Tensor, rollouts: Rollouts) -> list[Tensor]:  # T+1 tensors (N_i,)
        """(N,) leaf scores -> the value of every node."""
        if self.weighting == "mean":
            return average_up(score, rollouts.plan)
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
        return exact_where_alike(values[::-1], score, rollouts.plan)

    def _level(self, value: Tensor, prompt: object) -> Tensor:  # (N_i,)
        import torch

        group = torch.as_tensor(prompt, device=value.device)
        credit = torch.zeros_like(value)
        for which in torch.unique(group):
            rows = group == which
            nodes = value[rows]
            if bool((nodes != nodes[0]).any()) and (deviation := nodes.std()) >= self.least_std:
                credit[rows] = (nodes - nodes.mean()) / (deviation + self.epsilon)
        return credit


class ProcessAdvantage(CombiningAdvantage):
    """An edge's reward against the other trained edges of the same prompt and denoising step (TempFlow-GRPO).

    An edge's reward is the mean of the rollouts below it; with `tree: trunk` that is one, whose difference to its
    siblings this edge alone has made. Deviation: TempFlow-GRPO's statistics are those
    of the rollouts on one rank; here a prompt's are whole.
    """

    kind: Literal["process"] = "process"
    unbiased: bool = Field(False, description="divide by n-1 in the std, or by n (TempFlow-GRPO)")
    epsilon: float = Field(1e-4, gt=0, le=1, description="added to the std of a prompt's step (TempFlow-GRPO)")
    clip: float | None = Field(5.0, gt=0, le=1e6, description="advantages are cut off at +- this; null: never (all: 5)")

    def normalised(self, score: Judged, rollouts: Rollouts) -> list[Tensor]:  # T+1 tensors (N_i,)
        """Scores -> the advantage of every node whose edge is trained; 0 for others."""
        values = average_up(score.leaves, rollouts.plan)
        return of_each_step(values, rollouts.plan, standardised(self.unbiased, self.epsilon))

    def finished(self, values: list[Tensor], rollouts: Rollouts) -> Tensor:  # (E,)
        """Advantages of nodes -> the credit of each trained edge."""
        return trained([clamped(level, self.clip) for level in values], rollouts.plan)


def after_last_split(plan: RolloutPlan) -> BoolArray:  # (E,)
    """The trained edges after the last split of their prompt, in the order of `Rollouts.edges`."""
    last: Any = np.full(int(plan.group.max()) + 1, -1)
    for level, parent in enumerate(plan.parent):
        last[plan.prompt[level][np.bincount(parent) > 1]] = level
    late = [level > last[plan.prompt[level + 1][mask]] for level, mask in enumerate(plan.trained)]
    return np.concatenate(late)


def _owners(plan: RolloutPlan) -> IntArray:  # (E,)
    """The first rollout below each trained edge."""
    return np.concatenate([plan.first_leaf[level + 1][mask] for level, mask in enumerate(plan.trained)])
