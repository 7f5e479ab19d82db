"""Evaluation: held-out prompts under the deterministic sampler, for the policy beside the untouched base."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from aegpo.core.records import FloatArray, Prompt
from aegpo.core.reports import Evaluation
from aegpo.train.execution import Show
from aegpo.train.policy import Policy
from aegpo.train.scoring import Scorer, Scoring, score

Paint = Callable[[Show], Tensor]  # an image of each prompt, (B, [F,] 3, h, w) in [0, 1], shown on the way


class Evaluator:
    """What a run evaluates: the same prompts from the same noise every time, by all its rewards."""

    def __init__(self, policy: Policy, scorers: Sequence[Scorer], prompts: Sequence[Prompt]) -> None:
        self._policy, self._scorers, self._prompts = policy, scorers, tuple(prompts)
        self.prompts = tuple(prompt.text for prompt in prompts)
        self._known: HeldOut | None = None  # with the base policy's scores

    def evaluate(self) -> Evaluation:
        """Scores the held-out prompts for the policy (its averaged weights, if any) and, once, for the base.

        Raises:
            RewardError: if a reward fails; nothing was changed.
        """
        policy, begin = self._policy, time.perf_counter()
        paint = partial(policy.images, self._prompts, policy.evaluation_noise(self._prompts), None)
        if self._known is None:
            with policy.base():
                self._known = HeldOut(self._scorers, self._prompts, paint)
        with policy.averaged():
            scores, base_scores, images = self._known.evaluate(paint)
        kept = policy.experiment.evaluation.images
        return Evaluation(self.prompts, scores, base_scores, images[:kept].cpu(), time.perf_counter() - begin)


class HeldOut:
    """Scores of held-out prompts, for a policy beside the untouched base.

    A reward that compares the images of one prompt has nothing to compare there but the policy's image and the base's:
    its score is the policy's against the base's.
    """

    def __init__(self, scorers: Sequence[Scorer], prompts: Sequence[Prompt], paint_base: Paint) -> None:
        self._absolute = [scorer for scorer in scorers if not scorer.group_wise]
        self._relative = [scorer for scorer in scorers if scorer.group_wise]
        self._labels, self._prompts = [scorer.label for scorer in scorers], prompts
        base_images, scores = self._painted(paint_base)
        self.base_scores: Mapping[str, FloatArray] = scores  # (B,) of each reward that compares nothing
        self._base_images = base_images.cpu() if self._relative else None

    def evaluate(self, paint: Paint) -> tuple[dict[str, FloatArray], dict[str, FloatArray], Tensor]:
        """(B,) of each reward, for the policy that paints and for the base; and the images (B, [F,] 3, h, w)."""
        (images, scores), base_scores = self._painted(paint), dict(self.base_scores)
        if self._base_images is not None:
            for label, (ours, bases) in self._compared(images, self._base_images.to(images.device)).items():
                scores[label], base_scores[label] = ours, bases
        return self._in_order(scores), self._in_order(base_scores), images

    def _compared(self, images: Tensor, base_images: Tensor) -> dict[str, tuple[FloatArray, FloatArray]]:
        """(B,) of each reward that compares, of the policy's images and of the base's, each pair by itself.

        What the list asks twice is two pairs. Rewards take equal prompts for one group, so that the second is scored
        after the first.
        """
        found = {scorer.label: (np.zeros(len(images)), np.zeros(len(images))) for scorer in self._relative}
        for rows in _once_each(self._prompts):
            both, prompts = torch.cat([images[rows], base_images[rows]]), [self._prompts[row] for row in rows]
            for label, values in _as_numpy(score(self._relative, both, (*prompts, *prompts))).items():
                found[label][0][rows], found[label][1][rows] = values[: len(rows)], values[len(rows) :]
        return found

    def _painted(self, paint: Paint) -> tuple[Tensor, dict[str, FloatArray]]:
        """Images, and their scores where nothing is compared, some of which are found while others are painted."""
        with Scoring(self._absolute, self._prompts) as scoring:
            images = paint(scoring.show)
            return images, _as_numpy(scoring.finish(images))

    def _in_order(self, scores: Mapping[str, FloatArray]) -> dict[str, FloatArray]:
        return {label: scores[label] for label in self._labels}


def _once_each(prompts: Sequence[Prompt]) -> list[list[int]]:
    """The rows of prompts in as few lists as it takes for none to ask the same twice."""
    lists: list[list[int]] = []
    before: dict[tuple[str, tuple[Path, ...]], int] = {}
    for row, prompt in enumerate(prompts):
        nth = before.get(prompt.asked, 0)
        before[prompt.asked] = nth + 1
        if nth == len(lists):
            lists.append([])
        lists[nth].append(row)
    return lists


def _as_numpy(scores: Mapping[str, Tensor]) -> dict[str, FloatArray]:
    return {label: values.double().cpu().numpy() for label, values in scores.items()}
