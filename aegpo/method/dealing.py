"""Rollouts dealt out to the optimizer steps of a pass, and what that makes the network evaluate with a gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from aegpo.core.records import IntArray, RolloutPlan
from aegpo.core.sections import OptimizerSpec
from aegpo.method.partition import Partition
from aegpo.method.trained_edges import TrainedEdges

Deals = Sequence[Sequence[IntArray]]  # of every pass, the rollouts of each optimizer step


def deal(group: IntArray, spec: OptimizerSpec, rng: np.random.Generator) -> list[IntArray]:  # (N,)
    """The rollouts of each optimizer step of one pass; `group` is the prompt of each.

    `deal: prompts` keeps a prompt's rollouts together. Prompts are taken in a random order, those with more rollouts
    first, and each goes to the step that has the fewest rollouts so far; so with equal counts the steps differ by one
    prompt at most, and none is empty unless there are fewer prompts. The steps then come in a random order.
    """
    size = spec.rollouts_per_update or len(group)
    if spec.deal == "rollouts":
        return np.split(rng.permutation(len(group)), range(size, len(group), size))
    prompts, row, counts = np.unique(group, return_inverse=True, return_counts=True)
    order = rng.permutation(len(prompts))
    loads = np.zeros(math.ceil(len(group) / size), dtype=np.int64)
    owner = np.zeros(len(prompts), dtype=np.int64)
    for prompt in order[np.argsort(-counts[order], kind="stable")]:
        owner[prompt] = loads.argmin()
        loads[owner[prompt]] += counts[prompt]
    return [np.flatnonzero(owner[row] == step) for step in rng.permutation(np.flatnonzero(loads))]


def gradient_rows(plan: RolloutPlan, parts: Sequence[IntArray]) -> int:
    """States at which the network is evaluated with a gradient in one pass: each once in every optimizer step.

    Siblings share the evaluation if their rollouts were dealt to the same step. `parts`: the rollouts of each step.
    """
    edges = TrainedEdges.of(plan)
    return sum(len(np.unique(edges.begin[np.isin(edges.rollout, members)])) for members in parts)


def expected_gradient_rows(plan: RolloutPlan, spec: OptimizerSpec) -> float:
    """Those of one pass, in the mean over all ways to deal; where siblings always meet, that is what they are.

    Of k siblings among N rollouts, none is dealt to a step of n with probability C(N - k, n) / C(N, n): the
    hypergeometric distribution.
    """
    edges, total = TrainedEdges.of(plan), plan.num_rollouts
    size = spec.rollouts_per_update or total
    if size >= total or spec.deal == "prompts":
        return float(edges.begins)
    steps = [min(size, total - first) for first in range(0, total, size)]
    siblings, count = np.unique(np.bincount(edges.begin), return_counts=True)
    meeting = (sum(1 - _none(total, step, int(each)) for step in steps) for each in siblings)
    return float(sum(rows * many for rows, many in zip(meeting, count.tolist(), strict=True)))


def _none(total: int, drawn: int, marked: int) -> float:
    """The chance that none of the marked is among those drawn."""
    return math.comb(total - marked, drawn) / math.comb(total, drawn)


def worth_keeping(partition: Partition, members: IntArray) -> bool:
    """True if it costs less to learn from some rollouts' edges where they were sampled than to deal them out.

    Kept, a part's g states cost it a backward pass of two forwards each; dealt out, everybody has an equal share of
    all forwards and backward passes, but has to make those forwards a second time. Only the dearest part counts.
    """
    whole = TrainedEdges.of(partition.plan)
    chosen = np.isin(whole.rollout, members)
    all_of_them = len(np.unique(whole.begin[chosen]))
    owner = partition.edge_owner()
    own = [len(np.unique(whole.begin[chosen & (owner == part)])) for part in range(len(partition.parts))]
    kept = max(forwards + 2 * states for forwards, states in zip(partition.forwards, own, strict=True))
    return kept <= max(partition.forwards) + 3 * all_of_them / len(own)
