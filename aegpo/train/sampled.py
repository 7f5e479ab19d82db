"""A plan sampled part by part: what every process knows of all of it, and what each holds of its own parts."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from aegpo.core.records import RolloutPlan, Rollouts, Scores
from aegpo.method.partition import Partition
from aegpo.method.trained_edges import TrainedEdges
from aegpo.parallel.team import Team
from aegpo.train.edges import ELSEWHERE, edge_table
from aegpo.train.execution import Execution
from aegpo.train.retained import Retained


@dataclass(frozen=True)
class Sample:
    """One part of a plan, sampled and scored."""

    rollouts: Rollouts
    scores: Scores  # of its rollouts, and of its nodes where an advantage asks
    retained: Sequence[Retained] = ()  # what the first optimizer step evaluates, in its batches

    @classmethod
    def nothing(cls, how: Execution, part: RolloutPlan, rewards: int, levels: Sequence[int]) -> Sample:
        """That of a part with no rollouts."""
        device, shape = how.sigmas.device, how.model.latent_shape
        latents, scores = torch.zeros((0, *shape), dtype=how.storage, device=device), torch.zeros(0, rewards)
        log_prob = (torch.zeros(0, device=device),) * part.num_steps
        edges = edge_table(part, TrainedEdges.of(part), log_prob, latents)
        edges = replace(edges, velocity=latents.float() if how.keep_velocity else None)
        none = Rollouts(part, latents, torch.zeros(0, device=device), log_prob, edges)
        return cls(none, Scores(scores.to(device), {level: scores.to(device) for level in levels}))


@dataclass(frozen=True)
class Sampled:
    """A whole plan, of which this process sampled some parts."""

    partition: Partition
    own: Sequence[Rollouts]  # of this process's parts
    whole: Rollouts  # of all of them; where there are several, without the states, which stay where they are
    scores: Scores  # of all of them
    retained: Sequence[Sequence[Retained]] | None = None  # of this process's parts; None: nothing was to be retained

    @classmethod
    def of(cls, team: Team, partition: Partition, own: Sequence[Sample], retaining: bool = False) -> Sampled:
        """Puts together what the processes found; all of them have the same then.

        `retaining`: the first optimizer step goes by the batches of sampling.
        """
        retained = [each.retained for each in own] if retaining else None
        if team.shards == 1:
            return cls(partition, [own[0].rollouts], own[0].rollouts, own[0].scores, retained)
        plan = partition.plan
        leaves = team.gathered("scores", [each.scores.leaves for each in own], partition.rollouts)
        asked, steps = list(own[0].scores.nodes), range(1, plan.num_steps + 1)
        nodes = _of_owners(team, partition, asked, [[each.scores.nodes[level] for level in asked] for each in own])
        log_prob = _of_owners(team, partition, steps, [each.rollouts.log_prob for each in own])
        edges = edge_table(plan, TrainedEdges.of(plan), log_prob, ELSEWHERE)
        whole = Rollouts(plan, ELSEWHERE, ELSEWHERE, log_prob, edges, own[0].rollouts.prompts)
        scores = Scores(leaves, dict(zip(asked, nodes, strict=True)))
        return cls(partition, [each.rollouts for each in own], whole, scores, retained)

    def scored(self) -> Sampled:
        """The same without images, which nobody looks at once credit was given."""
        own = [replace(each, images=each.images[:0]) for each in self.own]
        return replace(self, own=own, whole=own[0] if len(own) == 1 and self.whole is self.own[0] else self.whole)

    def digest(self, credit: Tensor) -> str:
        """Of what everybody has to have alike: the plan, the scores and what edges are given credit for."""
        plan, digest = self.partition.plan, hashlib.sha256()
        for array in (*plan.prompt, *plan.parent, *plan.noisy, *plan.trained):
            digest.update(np.ascontiguousarray(array).tobytes())
        for tensor in (self.scores.leaves, *self.scores.nodes.values(), credit):
            digest.update(tensor.detach().cpu().numpy().tobytes())
        return digest.hexdigest()


def sampled_of(rollouts: Sampled | Rollouts) -> Sampled:
    """What was sampled of a plan; rollouts are all of it."""
    if isinstance(rollouts, Sampled):
        return rollouts
    whole = Partition(rollouts.plan, np.array([0, rollouts.plan.num_rollouts]))
    return Sampled(whole, [rollouts], rollouts, Scores(rollouts.latents[:0].float()))


def _of_owners(
    team: Team, partition: Partition, levels: Sequence[int], own: Sequence[Sequence[Tensor]]
) -> tuple[Tensor, ...]:  # (N_level, ...) each
    """What is known of the nodes of some levels, from the parts that own them.

    `own`: of each of this process's parts, and each level, that of all the part's nodes.
    """
    if not levels:
        return ()
    owned = []
    for shard, values in zip(team.mine, own, strict=True):
        chosen = []
        for level, of_nodes in zip(levels, values, strict=True):
            rows = partition.owned(level, shard) - partition.parts[shard].nodes[level][:1].sum()
            chosen.append(of_nodes[torch.from_numpy(rows).to(of_nodes.device)])
        owned.append(torch.cat(chosen))
    counts = np.stack([np.bincount(partition.owner(level), minlength=team.shards) for level in levels], axis=1)
    found = team.gathered(f"nodes of {len(levels)} levels", owned, counts.sum(axis=1).tolist())
    pieces = torch.split(found, counts.ravel().tolist())  # shard by shard, level by level
    return tuple(torch.cat(pieces[index :: len(levels)]) for index in range(len(levels)))
