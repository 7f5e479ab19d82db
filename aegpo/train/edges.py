"""Tables of trained edges: what a plan says of them, and the states that sampling added."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn, cast

import numpy as np
import torch
from torch import Tensor

from aegpo.core.records import Edges, RolloutPlan
from aegpo.errors import ContractError
from aegpo.method.trained_edges import TrainedEdges
from aegpo.train.places import on_device


class Elsewhere:
    """Stands for what no process has all of; who uses it is told what to do instead.

    Where a step is cut into shards, images and latents of its rollouts stay in the process that sampled them.
    """

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        _refuse()

    def __getitem__(self, rows: Any) -> NoReturn:
        _refuse()


def _refuse() -> NoReturn:
    raise ContractError(
        "a step is cut into shards, so nobody has the latents and images of all its rollouts; let a reward look at "
        "them, or set 'parallel.shards: 1'"
    )


ELSEWHERE = cast(Tensor, Elsewhere())


def edge_table(plan: RolloutPlan, known: TrainedEdges, log_prob: Sequence[Tensor], states: Tensor) -> Edges:
    """A plan's trained edges.

    Args:
        plan: what was sampled.
        known: its `TrainedEdges`.
        log_prob: T tensors (N_{i+1},), of the edges to the nodes of each level.
        states: (S, *x).
    """
    device = log_prob[0].device
    nodes = on_device([np.flatnonzero(trained) for trained in plan.trained], device)
    names = ("level", "prompt", "rollout", "leaves", "begin", "end", *(() if known.until is None else ("until",)))
    columns = zip(names, on_device([getattr(known, name) for name in names], device), strict=True)
    return Edges(
        **dict(columns),
        states=states,
        log_prob=torch.cat([each[rows] for each, rows in zip(log_prob, nodes, strict=True)]),
        scale=None if known.scale is None else torch.from_numpy(known.scale).float().to(device),
    )


def edge_weights(edges: Edges, reduction: str, kept: Tensor | None = None) -> Tensor:
    """The share of each trained edge in a training step's loss; (E,) float64, sums to 1; 0 where not `kept`.

    An edge counts as often as rollouts pass through it, so that the steps of a tree weigh what they would weigh if its
    rollouts were independent: near the root there are few edges, but every rollout passes them. `rollout`: that, over
    the sum of all edges. `prompt`: over the sum of the edges of the same prompt, and 1 / P for the P prompts that have
    trained edges, so that a prompt with 16 rollouts weighs what one with 8 does. `edge`: every edge counts once,
    whatever passes through it (BranchGRPO).
    """
    passes = (torch.ones_like(edges.leaves) if reduction == "edge" else edges.leaves).double()
    passes = passes if kept is None else passes * kept
    if reduction in ("rollout", "edge"):
        return passes / passes.sum()
    prompts, prompt = torch.unique(edges.prompt, return_inverse=True)
    total = totals(prompt, passes, len(prompts))
    return passes / (total[prompt] * (total > 0).sum())


def totals(index: Tensor, values: Tensor, count: int) -> Tensor:  # (E,), (E,) -> (count,)
    """Sums of values by index; `torch.bincount` has no deterministic kernel on a GPU."""
    return values.new_zeros(count).index_add(0, index, values)
