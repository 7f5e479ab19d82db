"""Samples and scores a plan: each process the parts that are its own, and then all of them know what came of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from aegpo.core import contracts
from aegpo.core.memory import enough_memory, lower
from aegpo.core.records import Conditioning, IntArray, Prompt, RolloutPlan
from aegpo.core.signals import Trunk
from aegpo.method.partition import Partition
from aegpo.train.execution import Show
from aegpo.train.noise import StepNoise
from aegpo.train.pieces import piece
from aegpo.train.policy import Policy
from aegpo.train.predicted import PredictedScores
from aegpo.train.retained import Keeping, Retention
from aegpo.train.rollouts import roll_out
from aegpo.train.sampled import Sample, Sampled
from aegpo.train.scoring import Scorer, Scoring
from aegpo.train.stopwatch import Stopwatch


def nothing_kept(partition: Partition) -> None:
    """Nobody learns from what is sampled."""


@dataclass(frozen=True)
class Asked:
    """What a training step's rollouts are sampled from."""

    prompts: Sequence[Prompt]  # P
    cond: Conditioning  # of the prompts
    noise: StepNoise
    trunk: Trunk | None  # that rollouts may start from
    levels: IntArray  # whose predicted images are scored, too
    keep: Callable[[Partition], Keeping | None] = nothing_kept  # what the first optimizer step learns from


class Sampling:
    """Executes plans with a policy, and has rewards score the images while others are painted."""

    def __init__(self, policy: Policy, scorers: Sequence[Scorer]) -> None:
        self._policy, self._scorers, self._team = policy, scorers, policy.team

    def sample(self, plan: RolloutPlan, asked: Asked, watch: Stopwatch) -> Sampled:
        """A whole plan, cut into as many parts as a step has shards; where rewards compare, prompts are not parted.

        Raises:
            ContractError, MemoryShortageError: if a part fails, or memory runs out.
        """
        compared = any(scorer.group_wise for scorer in self._scorers)
        partition = Partition.of(plan, self._team.shards, asked.prompts if compared else None)
        keeping = asked.keep(partition)
        with self._policy.lagging():
            own = [self._part(partition.parts[shard], shard, asked, keeping, watch) for shard in self._team.mine]
        with watch("reward"):
            return Sampled.of(self._team, partition, own, retaining=keeping is not None)

    def _part(self, part: RolloutPlan, shard: int, asked: Asked, keeping: Keeping | None, watch: Stopwatch) -> Sample:
        how, prompts = self._policy.how, [asked.prompts[row] for row in part.group]
        if not prompts:
            return Sample.nothing(how, part, len(self._scorers), asked.levels.tolist())
        retention = None if keeping is None else keeping(part)
        predicted = PredictedScores(how, self._scorers, part, asked.prompts, asked.levels, self._inspect)
        with piece(self._team, "rollouts", shard), Scoring(self._scorers, prompts) as scoring:
            with watch("rollout"), self._memory(retention):
                given = (asked.noise, asked.prompts, asked.trunk, self._inspected(scoring.show), predicted.look)
                rollouts = roll_out(how, part, asked.cond, *given, retention)
            with watch("reward"):  # of which rewards in lanes of their own have done a part already
                scores = scoring.finish(rollouts.images)
        found = predicted.beside(torch.stack(list(scores.values()), dim=1))
        return Sample(rollouts, found, () if retention is None else retention.batches)

    def _memory(self, retention: Retention | None) -> AbstractContextManager[None]:
        remedy = lower("rollouts.micro_batch", self._policy.micro_batch)
        if retention is not None:
            remedy = f"set 'optimizer.retain' to fewer GiB or to never, or {remedy}"
        return enough_memory("rollouts were sampled", remedy)

    def _inspected(self, show: Show) -> Show:
        """Shows what is known to be images."""

        def inspected(images: Tensor) -> None:
            self._inspect(images)
            show(images)

        return inspected

    def _inspect(self, images: Tensor) -> None:
        """Refuses what is no image."""
        model = self._policy.experiment.model
        with contracts.blaming("model", model.kind):
            contracts.check_images(model.kind, images, len(images), model.media)
