"""Tables of trained edges: what a plan says of them, and the states that sampling added."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import NoReturn, cast

import numpy as np
import torch
from torch import Tensor

from aegpo.core.records import BoolArray, Edges, FloatArray, IntArray, RolloutPlan
from aegpo.errors import ContractError

STATES = ("latents", "next_latents", "velocity")  # what a plan does not know


class Elsewhere:
    """Stands for what no process has all of; who uses it is told what to do instead.

    Where a step is cut into shards, images and latents of its rollouts stay in the process that sampled them.
    """

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ContractError(
            "a step is cut into shards, so nobody has the latents and images of all its rollouts; let a reward look "
            "at them, or set 'parallel.shards: 1'"
        )


ELSEWHERE = cast(Tensor, Elsewhere())


def edge_table(plan: RolloutPlan, log_prob: Sequence[Tensor], device: torch.device) -> Edges:
    """The trained edges of a plan without their states, in the order of `Rollouts.edges`.

    `log_prob`: T tensors (N_{i+1},), of the edges to the nodes of each level.
    """
    rows = [np.flatnonzero(trained) for trained in plan.trained]

    def joined_rows(values: Sequence[IntArray] | Sequence[FloatArray] | Sequence[BoolArray]) -> Tensor:
        return torch.from_numpy(np.concatenate([each[row] for each, row in zip(values, rows, strict=True)])).to(device)

    return Edges(
        level=joined_rows([np.full(len(each), level, dtype=np.int64) for level, each in enumerate(plan.trained)]),
        prompt=joined_rows(plan.prompt[1:]),
        rollout=joined_rows(plan.first_leaf[1:]),
        leaves=joined_rows(plan.leaves[1:]),
        latents=ELSEWHERE,
        next_latents=ELSEWHERE,
        log_prob=torch.cat([each[torch.from_numpy(row).to(device)] for each, row in zip(log_prob, rows, strict=True)]),
        until=None if plan.until is None else joined_rows(plan.until),
        scale=None if plan.scale is None else joined_rows(plan.scale).float(),
    )


def columns(edges: Edges) -> dict[str, Tensor]:
    """What is known of edges, by field."""
    found = {field.name: getattr(edges, field.name) for field in fields(edges)}
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def joined(parts: Sequence[Edges]) -> Edges:
    """Edges of several tables with the same columns, one after another."""
    tables = [columns(part) for part in parts]
    return Edges(**{name: torch.cat([table[name] for table in tables]) for name in tables[0]})
