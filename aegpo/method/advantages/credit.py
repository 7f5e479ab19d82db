"""What advantages share: from values of rollouts or nodes to the credit of trained edges."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field

from aegpo.core import contracts
from aegpo.core.parts import AdvantageSpec
from aegpo.core.records import RolloutPlan, Rollouts, Scores
from aegpo.errors import AegpoError, ContractError

if TYPE_CHECKING:
    from torch import Tensor

FIRST_EDITION = "it was written for aegpo 0.1, whose advantages took a tensor of scores"


@dataclass(frozen=True)
class Judged:
    """Scores under one reward, or of all rewards together."""

    leaves: Tensor  # (N,) float64
    nodes: Mapping[int, Tensor]  # level -> (N_level,) float64, of predicted clean images where they were asked for


class CombiningAdvantage(AdvantageSpec):
    """What advantages over several rewards share: summing scores, or normalising each first."""

    combine: Literal["sum", "per-reward"] = Field(
        "sum",
        description="weighted scores are summed, then normalised; or each reward is normalised, then summed by weight "
        "(MixGRPO's advantage_aggr, whose weights are divided by their sum: give weights that sum to 1; GDPO)",
    )

    def estimate(self, scores: Scores, weights: Tensor, rollouts: Rollouts) -> Tensor:  # (E,)
        """Scores and (R,) weights -> the credit of each trained edge."""
        import torch

        if self.combine == "sum":
            return self.finished(self.normalised(_summed(scores, weights), rollouts), rollouts)
        each = [self.normalised(score, rollouts) for score in _one_by_one(scores)]
        levels = zip(*each, strict=True)  # a node's advantages under every reward; weights count afterwards
        return self.finished([torch.stack(level, dim=1) @ weights.double() for level in levels], rollouts)

    def normalised(self, score: Judged, rollouts: Rollouts) -> list[Tensor]:  # T+1 tensors (N_i,)
        """Scores -> the advantage of every node."""
        raise NotImplementedError(f"advantage {self.kind!r} does not define normalised(score, rollouts)")

    def finished(self, values: list[Tensor], rollouts: Rollouts) -> Tensor:  # (E,)
        """Advantages of every node -> the credit of each trained edge."""
        raise NotImplementedError(f"advantage {self.kind!r} does not define finished(values, rollouts)")


def _summed(scores: Scores, weights: Tensor) -> Judged:
    """Weighted sums over rewards."""
    nodes = {level: (values.double() * weights.double()).sum(dim=1) for level, values in scores.nodes.items()}
    return Judged((scores.leaves.double() * weights.double()).sum(dim=1), nodes)


def _one_by_one(scores: Scores) -> list[Judged]:  # R
    """What each reward says."""
    columns = range(scores.leaves.shape[1])
    nodes = [{level: values.double()[:, column] for level, values in scores.nodes.items()} for column in columns]
    return [Judged(leaves, nodes[column]) for column, leaves in enumerate(scores.leaves.double().unbind(dim=1))]


def deviations(score: Tensor, group: Tensor, unbiased: bool) -> Tensor:  # (N,)
    """The std of each value's group."""
    import torch

    found = score.new_zeros(int(group.max()) + 1)
    for which in torch.unique(group):
        found[which] = score[group == which].std(correction=int(unbiased))
    return found[group]


def centred(score: Tensor, group: Tensor) -> Tensor:  # (N,)
    """Each value minus its group's mean; exactly 0 in a group of equal values, whose mean rounds."""
    size = int(group.max()) + 1
    total = score.new_zeros(size).index_add(0, group, score)
    members = score.new_zeros(size).index_add(0, group, score.new_ones(len(score)))
    return (score - (total / members)[group]).masked_fill(alike(score, group)[group], 0.0)


def alike(score: Tensor, group: Tensor) -> Tensor:  # (groups,) bool
    """Whether the values of each group are all equal, bit for bit: then there is nothing to compare."""
    import torch

    ends = (score.new_full((int(group.max()) + 1,), sign * torch.inf) for sign in (1, -1))
    least, most = (each.scatter_reduce(0, group, score, how) for each, how in zip(ends, ("amin", "amax"), strict=True))
    return least == most


def exact_where_alike(values: list[Tensor], leaves: Tensor, plan: RolloutPlan) -> list[Tensor]:  # T+1 tensors (N_i,)
    """Values of nodes made of those of rollouts, but where a prompt's rollouts are alike that one value, unrounded."""
    import torch

    owner = torch.from_numpy(plan.group).to(leaves.device)
    same = alike(leaves, owner)
    if not bool(same.any()):
        return values
    common = leaves.new_zeros(len(same)).scatter(0, owner, leaves)
    rows = (torch.from_numpy(prompts).to(leaves.device) for prompts in plan.prompt)
    return [torch.where(same[row], common[row], value) for row, value in zip(rows, values, strict=True)]


def standardised(unbiased: bool, epsilon: float) -> Callable[[Tensor, Tensor], Tensor]:
    """(n,) values and (n,) groups -> each value minus its group's mean, over the group's std plus epsilon."""

    def normalise(values: Tensor, group: Tensor) -> Tensor:
        spread = deviations(values, group, unbiased).nan_to_num()  # a single value has none
        return centred(values, group) / (spread + epsilon)

    return normalise


def of_each_step(
    values: list[Tensor], plan: RolloutPlan, normalise: Callable[[Tensor, Tensor], Tensor]
) -> list[Tensor]:  # T+1 tensors (N_i,)
    """What `normalise(values, prompts)` makes of the trained edges of each step; 0 for other nodes."""
    import torch

    found = [torch.zeros_like(values[0])]
    for level, value in enumerate(values[1:]):
        rows = torch.from_numpy(np.flatnonzero(plan.trained[level])).to(value.device)
        advantage = torch.zeros_like(value)
        if len(rows):
            group = torch.from_numpy(plan.prompt[level + 1]).to(value.device)[rows]
            advantage[rows] = normalise(value[rows], group)
        found.append(advantage)
    return found


def trained(values: list[Tensor], plan: RolloutPlan) -> Tensor:  # (E,) float32
    """The values of trained edges' children, level by level, from values of every node."""
    import torch

    chosen = [value[torch.from_numpy(mask)] for value, mask in zip(values[1:], plan.trained, strict=True)]
    return torch.cat(chosen).float()


def average_up(leaf_values: Tensor, plan: RolloutPlan) -> list[Tensor]:  # T+1 tensors (N_i,)
    """The mean over the leaves below each node; of leaves that are all the same in their prompt, exactly that."""
    import torch

    sums = [leaf_values]
    for level in reversed(range(plan.num_steps)):
        parent = torch.from_numpy(plan.parent[level]).to(leaf_values.device)
        sums.append(leaf_values.new_zeros(len(plan.prompt[level])).index_add(0, parent, sums[-1]))
    counts = (torch.from_numpy(count).to(leaf_values.device) for count in plan.leaves)
    means = [total / count for total, count in zip(reversed(sums), counts, strict=True)]
    return exact_where_alike(means, leaf_values, plan)


def clamped(values: Tensor, limit: float | None) -> Tensor:
    """Values cut off at +- the limit, if there is one."""
    return values if limit is None else values.clamp(-limit, limit)


@contextmanager
def crediting(kind: str) -> Iterator[None]:
    """Inside, an advantage is called: it is blamed by name, and one that took scores for a tensor is told so.

    Raises:
        ContractError: if the advantage fails; its cause is its own error.
    """
    with contracts.blaming("advantage", kind):
        try:
            yield
        except AegpoError:
            raise
        except Exception as error:
            if not _took_a_tensor(error):
                raise
            failed = f"advantage {kind!r} failed with {type(error).__name__}: {error}"
            raise ContractError(f"{failed}; {FIRST_EDITION}: use scores.leaves") from error


def _took_a_tensor(error: Exception) -> bool:
    """True for failures of an advantage that took `Scores` for a tensor, as scores were in aegpo 0.1."""
    if isinstance(error, AttributeError):
        import torch

        return isinstance(error.obj, Scores) and error.name in dir(torch.Tensor)
    # "unsupported operand type(s) for *: 'Scores' and ...", "must be Tensor, not Scores", "infer dtype of Scores"
    return isinstance(error, (TypeError, ValueError, RuntimeError)) and re.search(r"\bScores\b", str(error)) is not None
