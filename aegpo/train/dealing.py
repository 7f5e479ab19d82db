"""How a training step's edges are dealt out: to optimizer steps, and of one of these to forward-backwards."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from aegpo.core.records import IntArray
from aegpo.core.sections import OptimizerSpec


def deal(group: IntArray, spec: OptimizerSpec, rng: np.random.Generator) -> list[Tensor]:  # (N,)
    """The rollouts of each optimizer step of one pass; `group` is the prompt of each.

    `deal: prompts` keeps a prompt's rollouts together. Prompts are taken in a random order, those with more rollouts
    first, and each goes to the step that has the fewest rollouts so far; so with equal counts the steps differ by one
    prompt at most, and none is empty unless there are fewer prompts. The steps then come in a random order.
    """
    size = spec.rollouts_per_update or len(group)
    if spec.deal == "rollouts":
        return list(torch.split(torch.from_numpy(rng.permutation(len(group))), size))
    prompts, row, counts = np.unique(group, return_inverse=True, return_counts=True)
    order = rng.permutation(len(prompts))
    loads = np.zeros(math.ceil(len(group) / size), dtype=np.int64)
    owner = np.zeros(len(prompts), dtype=np.int64)
    for prompt in order[np.argsort(-counts[order], kind="stable")]:
        owner[prompt] = loads.argmin()
        loads[owner[prompt]] += counts[prompt]
    return [torch.from_numpy(np.flatnonzero(owner[row] == step)) for step in rng.permutation(np.flatnonzero(loads))]


def whole_groups(rows: Tensor, group: Tensor, most: int) -> list[Tensor]:  # (B,), (E,)
    """The edges `rows` in batches of whole groups, as many as fit into `most` edges; a larger group is one alone."""
    rows = rows[group[rows].argsort(stable=True)]
    batches = [0]
    for size in filter(None, torch.bincount(group[rows]).tolist()):
        if batches[-1] + size <= most or batches[-1] == 0:
            batches[-1] += size
        else:
            batches.append(size)
    return list(torch.split(rows, batches))
