"""Evaluation: held-out prompts under the deterministic sampler, for the policy beside the untouched base."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from aegpo.core.records import FloatArray, Prompt
from aegpo.core.reports import Evaluation
from aegpo.core.sharing import Arrays, Store
from aegpo.train.execution import Show
from aegpo.train.pieces import piece, shares
from aegpo.train.policy import Policy
from aegpo.train.scoring import Scorer, Scoring, score
from aegpo.train.shared_scores import SharedScores, as_bytes, of_bytes

_T = TypeVar("_T")
Paint = Callable[[Show], Tensor]  # an image of each of N prompts, (N, [F,] 3, h, w) in [0, 1], shown on the way


@dataclass(frozen=True)
class _Scored:
    """What an evaluation found of some prompts."""

    scores: Mapping[str, FloatArray]  # (n * images,) of each reward, for the policy
    base_scores: Mapping[str, FloatArray]
    images: Tensor  # (n, [F,] 3, h, w) the first of each prompt, on the CPU


class Evaluator:
    """What a run evaluates: the same prompts from the same noise every time, by all its rewards."""

    def __init__(self, policy: Policy, scorers: Sequence[Scorer], prompts: Sequence[Prompt]) -> None:
        self._policy, self._scorers = policy, scorers
        self._images = policy.experiment.evaluation.images_per_prompt
        self._shares = shares(len(prompts), policy.team.shards)
        self._parts = {  # of each of this process's shards; no more images at a time than with one each
            shard: [*parts(own, self._images, len(own))]
            for shard in policy.team.mine
            if (own := prompts[self._shares[shard]])
        }
        self.prompts = tuple(prompt.text for prompt in prompts)
        self._known: dict[int, list[HeldOut]] | None = None  # of each part, with the base policy's scores
        self._shared: SharedScores | None = None
        self._base_scores: dict[str, FloatArray] | None = None  # (P,) of each reward, if they are shared

    def share(self, store: Store) -> None:
        """Shares what does not depend on training with other runs, where scores follow from what is known of them."""
        asked = [[prompt for part in parts for prompt in part] for parts in self._parts.values()]
        self._shared = SharedScores.of(store, self._policy, self._scorers, asked)

    def evaluate(self, untrained: bool = False) -> Evaluation:
        """Scores the held-out prompts for the policy (its averaged weights, if any) and, once, for the base.

        Args:
            untrained: the policy has learned nothing yet.

        Raises:
            RewardError: if a reward fails; nothing was changed.
        """
        begin = time.perf_counter()
        found = self._beside_base() if self._shared is None else self._apart(self._shared, untrained)
        return Evaluation(self.prompts, *found, time.perf_counter() - begin)

    def _beside_base(self) -> tuple[dict[str, FloatArray], dict[str, FloatArray], Tensor]:
        """Scores of the policy and of the base, whose images may be compared; and the policy's images."""
        policy = self._policy
        if self._known is None:
            with policy.base():
                self._known = self._worked_on(self._begun)
        with policy.averaged():
            found = self._worked_on(self._scored)
        scores = self._means({shard: [each.scores for each in parts] for shard, parts in found.items()})
        base_scores = self._means({shard: [each.base_scores for each in parts] for shard, parts in found.items()})
        return (
            scores,
            base_scores,
            self._grid({shard: [each.images for each in parts] for shard, parts in found.items()}),
        )

    def _apart(
        self, shared: SharedScores, untrained: bool
    ) -> tuple[dict[str, FloatArray], dict[str, FloatArray], Tensor]:
        """The same, where neither is compared with the other, so that both may be known from elsewhere."""
        policy, labels = self._policy, [scorer.label for scorer in self._scorers]

        def measured() -> Arrays:
            found = self._worked_on(self._alone)
            scores = self._means({shard: [each.scores for each in parts] for shard, parts in found.items()})
            grid = self._grid({shard: [each.images for each in parts] for shard, parts in found.items()})
            return {"scores": np.stack([scores[label] for label in labels], axis=1), **as_bytes(grid)}

        def by_label(table: FloatArray) -> dict[str, FloatArray]:
            return {label: np.ascontiguousarray(table[:, column]) for column, label in enumerate(labels)}

        if self._base_scores is None:
            with policy.base():
                self._base_scores = by_label(shared.of_base(lambda: {"scores": measured()["scores"]})["scores"])
        with policy.averaged():
            found = shared.of_start(measured) if untrained else measured()
        return by_label(found["scores"]), dict(self._base_scores), of_bytes(found)

    def _worked_on(self, work: Callable[[int, int, Sequence[Prompt]], _T]) -> dict[int, list[_T]]:
        """What comes of each part of this process's shards: of a shard, the how-manieth part, and its prompts."""
        found = dict[int, list[_T]]()
        for shard, own in self._parts.items():
            with piece(self._policy.team, "evaluation", shard):
                found[shard] = [work(shard, number, part) for number, part in enumerate(own)]
        return found

    def _begun(self, shard: int, number: int, part: Sequence[Prompt]) -> HeldOut:
        """A part with the base policy's scores."""
        return HeldOut(self._scorers, repeated(part, self._images), self._painter(part))

    def _scored(self, shard: int, number: int, part: Sequence[Prompt]) -> _Scored:
        """A part's images for the policy, scored beside the base's."""
        assert self._known is not None, "the base comes first"
        scores, base_scores, images = self._known[shard][number].evaluate(self._painter(part))
        return _Scored(scores, base_scores, images[:: self._images].contiguous().cpu())  # which hold no others

    def _alone(self, shard: int, number: int, part: Sequence[Prompt]) -> _Scored:
        """A part's images for the policy, or the base, scored with no other beside it."""
        images, scores = Alone(self._scorers, repeated(part, self._images)).painted(self._painter(part))
        return _Scored(scores, {}, images[:: self._images].contiguous().cpu())

    def _painter(self, part: Sequence[Prompt]) -> Paint:
        policy, images = self._policy, self._images
        return partial(policy.images, repeated(part, images), policy.evaluation_noise(part, images=images), None)

    def _means(self, found: Mapping[int, Sequence[Mapping[str, FloatArray]]]) -> dict[str, FloatArray]:  # (P,) each
        """The mean of each prompt's scores, of every reward; `found`: those of each part of this process's shards."""
        labels = [scorer.label for scorer in self._scorers]
        own = [torch.zeros((0, len(labels)), dtype=torch.float64)]
        for parts_of_shard in found.values():
            for part in parts_of_shard:
                means = [part[label].reshape(-1, self._images).mean(axis=1) for label in labels]
                own.append(torch.from_numpy(np.stack(means, axis=1)))
        counts = [rows.stop - rows.start for rows in self._shares]
        table = self._policy.team.gathered("scores of evaluation", [torch.cat(own)], counts).numpy()
        return {label: np.ascontiguousarray(table[:, column]) for column, label in enumerate(labels)}

    def _grid(self, found: Mapping[int, Sequence[Tensor]]) -> Tensor:  # (n, [F,] 3, h, w), on the CPU
        """The first images of the first prompts."""
        kept, own = self._policy.experiment.evaluation.images, list[Tensor]()
        for shard, images in found.items():
            own.append(torch.cat(list(images))[: max(0, kept - self._shares[shard].start)])
        counts = [max(0, min(rows.stop, kept) - rows.start) for rows in self._shares]
        return self._policy.team.spread("images of evaluation", [torch.cat(own)] if own else [], counts)[0].cpu()


class Alone:
    """Scores of one policy's images of held-out prompts by the rewards that compare them with no other policy's."""

    def __init__(self, scorers: Sequence[Scorer], prompts: Sequence[Prompt]) -> None:
        """`prompts`: (N,) of the images."""
        self._absolute = [scorer for scorer in scorers if not scorer.group_wise]
        self._among = [scorer for scorer in scorers if scorer.group_wise and scorer.compared_with == "own"]
        self._prompts = prompts

    def painted(self, paint: Paint) -> tuple[Tensor, dict[str, FloatArray]]:
        """Images (N, [F,] 3, h, w), and (N,) scores of each such reward, some found while others are painted."""
        with Scoring(self._absolute, self._prompts) as scoring:
            images = paint(scoring.show)
            return images, _as_numpy(scoring.finish(images)) | self._compared_among(images)

    def _compared_among(self, images: Tensor) -> dict[str, FloatArray]:
        """(N,) of each reward that compares a policy's images of a prompt with one another.

        What the list asks twice is two groups, scored one after the other.
        """
        found = {scorer.label: np.zeros(len(images)) for scorer in self._among}
        occurrences = dict.fromkeys(prompt.occurrence for prompt in self._prompts) if self._among else {}
        for occurrence in occurrences:
            rows = [row for row, prompt in enumerate(self._prompts) if prompt.occurrence == occurrence]
            prompts = [self._prompts[row] for row in rows]
            for label, values in _as_numpy(score(self._among, images[rows], prompts)).items():
                found[label][rows] = values
        return found


class HeldOut:
    """Scores of images of held-out prompts, for a policy beside the untouched base.

    A reward that compares the images of one prompt says with what (`RewardSpec.compared_with`): the policy's image
    with the base's, so that its score is the one's against the other's, or each policy's images among themselves.
    """

    def __init__(self, scorers: Sequence[Scorer], prompts: Sequence[Prompt], paint_base: Paint) -> None:
        """`prompts`: (N,) of the images; one that is painted several times is there as often, as `repeated` does."""
        self._alone = Alone(scorers, prompts)
        self._relative = [scorer for scorer in scorers if scorer.group_wise and scorer.compared_with == "base"]
        self._labels, self._prompts = [scorer.label for scorer in scorers], prompts
        base_images, scores = self._alone.painted(paint_base)
        self.base_scores: Mapping[str, FloatArray] = scores  # (N,) of each reward that needs no policy beside the base
        self._base_images = base_images.cpu() if self._relative else None

    def evaluate(self, paint: Paint) -> tuple[dict[str, FloatArray], dict[str, FloatArray], Tensor]:
        """(N,) of each reward, for the policy that paints and for the base; and the images (N, [F,] 3, h, w)."""
        (images, scores), base_scores = self._alone.painted(paint), dict(self.base_scores)
        if self._base_images is not None:
            for label, (ours, bases) in self._compared(images, self._base_images.to(images.device)).items():
                scores[label], base_scores[label] = ours, bases
        return self._in_order(scores), self._in_order(base_scores), images

    def _compared(self, images: Tensor, base_images: Tensor) -> dict[str, tuple[FloatArray, FloatArray]]:
        """(N,) of each reward that compares with the base, of the policy's images and the base's, pair by pair.

        What is painted twice is two pairs. Rewards take equal prompts for one group, so that the second is scored
        after the first.
        """
        found = {scorer.label: (np.zeros(len(images)), np.zeros(len(images))) for scorer in self._relative}
        for rows in _once_each(self._prompts):
            both, prompts = torch.cat([images[rows], base_images[rows]]), [self._prompts[row] for row in rows]
            for label, values in _as_numpy(score(self._relative, both, (*prompts, *prompts))).items():
                found[label][0][rows], found[label][1][rows] = values[: len(rows)], values[len(rows) :]
        return found

    def _in_order(self, scores: Mapping[str, FloatArray]) -> dict[str, FloatArray]:
        return {label: scores[label] for label in self._labels}


def repeated(prompts: Sequence[Prompt], images: int) -> tuple[Prompt, ...]:
    """The prompt of each image, where those of a prompt are neighbours, as in `Policy.evaluation_noise`."""
    return tuple(prompt for prompt in prompts for _ in range(images))


def parts(prompts: Sequence[Prompt], images: int, most: int) -> Iterator[Sequence[Prompt]]:
    """Prompts in parts, in order: so many that each has at most `most` images, but a prompt's are never parted."""
    size = max(1, most // images)
    return (prompts[first : first + size] for first in range(0, len(prompts), size))


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
