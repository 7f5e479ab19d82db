"""Scores of rewards: built from their specs, checked by name, and found while other images are still painted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from aegpo.core import contracts, memory
from aegpo.core.interfaces import Reward
from aegpo.core.parts import ComparedWith, RewardSpec
from aegpo.core.records import FrameRule, IntArray, Prompt
from aegpo.core.signatures import built
from aegpo.errors import AegpoError, ContractError, RewardError


@dataclass(frozen=True)
class Scorer:
    """A reward that is ready to score, and what the engine needs to know about it."""

    label: str
    reward: Reward
    lane: str  # of RewardSpec.lane; "": the run's own device
    early: int  # of RewardSpec.early
    group_wise: bool  # of RewardSpec.group_wise
    micro_batch: int | None = None  # of its spec, if it has one
    frames: FrameRule | None = None  # of RewardSpec.frames
    kind: str = ""  # of its spec
    compared_with: ComparedWith = "base"  # of RewardSpec.compared_with


def build_scorers(specs: Sequence[RewardSpec], device: torch.device) -> list[Scorer]:
    """Every reward of the list, on its device."""
    return [_build_scorer(spec, device) for spec in specs]


def _build_scorer(spec: RewardSpec, device: torch.device) -> Scorer:
    reward = built("reward", spec.label, partial(spec.build, device), Reward, kind=spec.kind)
    batch = spec.model_dump(include={"micro_batch"}).get("micro_batch")
    own = ("", str(device), *((device.type, f"{device.type}:0") if device.index in (None, 0) else ()))
    with contracts.blaming("reward", spec.label, kind=spec.kind):
        lane = "" if spec.lane in own else spec.lane
        early = spec.early if lane else 0
        return Scorer(
            spec.label, reward, lane, early, spec.group_wise, batch, spec.frames, spec.kind, spec.compared_with
        )


def score(scorers: Sequence[Scorer], images: Tensor, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
    """(N, [F,] 3, h, w) in [0, 1] and N prompts -> (N,) float32 for each reward, checked, on the images' device.

    Raises:
        RewardError: if a reward fails or returns what it must not; the message names it.
    """
    with Scoring(scorers, prompts) as scoring:
        return scoring.finish(images)


class Scoring:
    """Scores of N images, some of which may be asked for while others are still painted.

    Rewards of one lane are asked in turn, those of different lanes at the same time. Rewards of lanes other than the
    run's own are given images as soon as these are shown, as many at a time as give the scores that all at once would:
    whole micro-batches, or where images of a prompt are compared, whole groups. What comes out does not depend on when
    it was asked for. Leaving the block by an error waits for what a reward is at, and asks for no more.
    """

    def __init__(self, scorers: Sequence[Scorer], prompts: Sequence[Prompt]) -> None:
        self._scorers, self._prompts = scorers, prompts
        self._shown: list[Tensor] = []  # ([F,] 3, h, w) each
        self._due = {scorer.label: _due(scorer, prompts) for scorer in scorers}
        self._asked = {scorer.label: np.zeros(len(prompts), dtype=np.bool_) for scorer in scorers}
        self._answers: list[tuple[Scorer, IntArray, Future[Tensor]]] = []
        calls = _calls_by_lane(scorers)
        self._lanes = {lane: ThreadPoolExecutor(most) for lane, most in calls.items()}

    def __enter__(self) -> Scoring:
        return self

    def __exit__(self, *error: object) -> None:
        for pool in self._lanes.values():
            pool.shutdown(wait=False, cancel_futures=True)
        for pool in self._lanes.values():
            pool.shutdown(wait=True)

    def show(self, images: Tensor) -> None:
        """The next images (b, [F,] 3, h, w) are there.

        Raises:
            RewardError: if a reward has failed meanwhile.
        """
        if any(scorer.early for scorer in self._scorers):
            self._shown += images.unbind()
            for scorer in self._apart():
                rows = self._rows(scorer, len(self._shown))
                if len(rows):
                    self._ask(scorer, rows, torch.stack([self._shown[row] for row in rows]))
        for _, _, answer in self._answers:
            if answer.done():
                answer.result()

    def finish(self, images: Tensor) -> dict[str, Tensor]:  # (N, [F,] 3, h, w)
        """Scores (N,) float32 of all images, which are those that were shown, for each reward.

        Raises:
            RewardError: if a reward fails or returns what it must not; the message names it.
        """
        self._shown.clear()
        for scorer in self._apart():
            rows = self._rows(scorer, len(images))
            if len(rows):
                self._ask(scorer, rows, images if len(rows) == len(images) else images[torch.from_numpy(rows)])
        scores: dict[str, Tensor] = {}
        for scorer in self._scorers:
            if not scorer.lane:
                scores[scorer.label] = _asker(scorer)(scorer, images, self._prompts)
        for scorer, rows, answer in self._answers:
            found = answer.result()
            values = scores.setdefault(scorer.label, found.new_empty(len(images)))
            values[torch.from_numpy(rows)] = found
        return {scorer.label: scores[scorer.label] for scorer in self._scorers}

    def _apart(self) -> list[Scorer]:
        return [scorer for scorer in self._scorers if scorer.lane]

    def _rows(self, scorer: Scorer, shown: int) -> IntArray:
        """The images that a reward may be asked about and was not."""
        rows = np.flatnonzero((self._due[scorer.label] <= shown) & ~self._asked[scorer.label])
        self._asked[scorer.label][rows] = True
        return rows

    def _ask(self, scorer: Scorer, rows: IntArray, images: Tensor) -> None:
        prompts = [self._prompts[row] for row in rows]
        answer = self._lanes[scorer.lane].submit(_asker(scorer), scorer, images, prompts)
        self._answers.append((scorer, rows, answer))


def _due(scorer: Scorer, prompts: Sequence[Prompt]) -> IntArray:  # (N,)
    """How many images must be there before a reward may be asked about each."""
    count = len(prompts)
    if not scorer.early:
        return np.full(count, count, dtype=np.int64)
    if scorer.group_wise:
        last = {prompt.asked: row for row, prompt in enumerate(prompts)}
        return np.array([last[prompt.asked] + 1 for prompt in prompts], dtype=np.int64)
    size = scorer.micro_batch or 1
    due: IntArray = np.minimum((np.arange(count) // size + 1) * size, count)
    return due


def _calls_by_lane(scorers: Sequence[Scorer]) -> dict[str, int]:
    """How many calls each lane but the run's own takes at a time: what the least of its rewards takes."""
    calls: dict[str, int] = {}
    for scorer in scorers:
        if scorer.lane:
            most = max(1, scorer.early)
            calls[scorer.lane] = min(calls.get(scorer.lane, most), most)
    return calls


def _asker(scorer: Scorer) -> Callable[[Scorer, Tensor, Sequence[Prompt]], Tensor]:
    """How a reward is asked: about images as they are, or about videos frame by frame where its `frames` says so."""
    return _score_one if scorer.frames is None else _score_frames


def _score_frames(scorer: Scorer, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:  # (N, F, 3, h, w) -> (N,)
    """Scores of videos, from those of their frames.

    Frames of one time are scored together: a group-wise reward compares them with that time's of the other videos of a
    prompt, not with their own, and no reward is given more images than there are rollouts.
    """
    times = images.unbind(dim=1)[: 1 if scorer.frames == "first" else None]
    scores = torch.stack([_score_one(scorer, frames.contiguous(), prompts) for frames in times])
    return scores.amin(dim=0) if scorer.frames == "min" else scores.mean(dim=0)


def _score_one(scorer: Scorer, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:  # (N,) float32
    shown = images.data  # the same memory with a version of its own, so that who writes into it is known
    version = shown._version
    try:
        with contracts.blaming("reward", scorer.label, once=True, kind=scorer.kind):
            with torch.no_grad():
                given = scorer.reward.score(shown, prompts)
            contracts.check_scores(scorer.label, given, prompts)
            if shown._version != version:
                raise ContractError(
                    f"reward {scorer.label!r} changed the images in place, which others still need; copy them first"
                )
    except AegpoError as error:
        raise _of(scorer, str(error)) from error.__cause__
    except Exception as error:
        if not memory.is_shortage(error):
            raise
        raise _of(scorer, _too_large(scorer, error)) from None
    return given.detach().to(images.device)


def _of(scorer: Scorer, message: str) -> RewardError:
    error = RewardError(message)
    contracts.blamed(error, "reward", scorer.kind)
    return error


def _too_large(scorer: Scorer, error: Exception) -> str:
    remedy = "let it score fewer images at once, or run it elsewhere: see 'aegpo serve-reward'"
    if scorer.micro_batch is not None:
        remedy = memory.lower(f"{scorer.label}.micro_batch", scorer.micro_batch)
    return f"reward {scorer.label!r} ran out of memory ({memory.brief(error)}); {remedy}"
