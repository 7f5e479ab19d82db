"""Scores of images that are predicted on the way, found while a plan is executed, so that few wait in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from aegpo.core.records import IntArray, Prompt, RolloutPlan, Scores
from aegpo.train.asking import decoded
from aegpo.train.execution import Execution
from aegpo.train.scoring import Scorer, score


class PredictedScores:
    """Scores of the predicted clean images of some levels of a plan.

    Images are decoded `micro_batch` at a time. They are scored at once and forgotten; only where a reward compares the
    images of a prompt do they wait until all of the prompt's at that level are there, in whatever rows it is asked.
    """

    def __init__(
        self,
        how: Execution,
        scorers: Sequence[Scorer],
        plan: RolloutPlan,
        prompts: Sequence[Prompt],  # P, the rows of the plan's `prompt`
        levels: IntArray,
        inspect: Callable[[Tensor], None],
    ) -> None:
        """`inspect`: refuses what is no image, before anything is scored."""
        self._how, self._scorers, self._prompts, self._inspect = how, scorers, prompts, inspect
        self._whole_groups = any(scorer.group_wise for scorer in scorers)
        first = {prompt.asked: row for row, prompt in reversed(list(enumerate(prompts)))}
        mates = np.array([first[prompt.asked] for prompt in prompts], dtype=np.int64)
        self._levels = {int(level): _Level(plan.prompt[level], mates[plan.prompt[level]]) for level in levels}

    def look(self, level: int, clean: Tensor) -> None:
        """Decodes and scores what is predicted at the next nodes of a level, (b, *x); other levels do not matter.

        Raises:
            RewardError: if a reward fails or returns what it must not; the message names it.
        """
        if level not in self._levels:
            return
        for part in torch.split(clean, self._how.micro_batch):
            images = decoded(self._how, part)
            self._inspect(images)
            for nodes, complete in self._levels[level].arrived(images, self._whole_groups):
                asked = [self._prompts[row] for row in self._levels[level].prompt[nodes]]
                found = score(self._scorers, complete, asked)
                self._levels[level].keep(nodes, torch.stack(list(found.values()), dim=1))

    def beside(self, leaves: Tensor) -> Scores:
        """All scores, once the plan was executed; `leaves`: (N, R) of the rollouts."""
        return Scores(leaves, {level: each.scores for level, each in self._levels.items()})


class _Level:
    """Predicted images of one level: which wait, and what the others scored."""

    def __init__(self, prompt: IntArray, mates: IntArray) -> None:
        """`mates`: (N_level,), equal where rewards compare images, since the same is asked."""
        self.prompt, self._mates = prompt, mates  # (N_level,)
        self.scores = torch.zeros(0)
        self._waiting: dict[int, Tensor] = {}  # node -> (3, h, w)
        self._seen = 0

    def arrived(self, images: Tensor, whole_groups: bool) -> list[tuple[IntArray, Tensor]]:
        """Nodes and their images (n, [F,] 3, h, w) that can be scored now that the next (b, [F,] 3, h, w) are there."""
        nodes = np.arange(self._seen, self._seen + len(images))
        self._seen += len(images)
        if not whole_groups:
            return [(nodes, images)]
        self._waiting |= dict(zip(nodes.tolist(), images, strict=True))
        ready: list[tuple[IntArray, Tensor]] = []
        for row in np.unique(self._mates[nodes]):
            group = np.flatnonzero(self._mates == row)
            if group[-1] < self._seen:
                ready.append((group, torch.stack([self._waiting.pop(int(node)) for node in group])))
        return ready

    def keep(self, nodes: IntArray, found: Tensor) -> None:
        """Scores (n, R) of some nodes."""
        if not len(self.scores):
            self.scores = found.new_zeros(len(self.prompt), found.shape[1])
        self.scores[torch.from_numpy(nodes).to(found.device)] = found
