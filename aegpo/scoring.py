"""Scores of rewards: built from their specs, checked by name, and in different lanes at the same time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from aegpo import contracts, shortage
from aegpo.errors import AegpoError, RewardError
from aegpo.interfaces import Reward
from aegpo.parts import RewardSpec
from aegpo.records import FloatArray


@dataclass(frozen=True)
class Scorer:
    """A reward that is ready to score, and what the engine needs to know about it."""

    label: str
    reward: Reward
    lane: str  # of RewardSpec.lane
    group_wise: bool  # of RewardSpec.group_wise
    micro_batch: int | None = None  # of its spec, if it has one


def build_scorers(specs: Sequence[RewardSpec], device: torch.device) -> list[Scorer]:
    """Every reward of the list, on its device."""
    return [_build_scorer(spec, device) for spec in specs]


def _build_scorer(spec: RewardSpec, device: torch.device) -> Scorer:
    with contracts.blaming("reward", spec.label):
        reward = spec.build(device)
    batch = spec.model_dump(include={"micro_batch"}).get("micro_batch")
    return Scorer(spec.label, reward, spec.lane, spec.group_wise, batch)


def score(scorers: Sequence[Scorer], images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
    """(N, 3, h, w) in [0, 1] and N prompts -> (N,) float32 for each reward, checked, on the images' device.

    Rewards of one lane are asked in turn, those of different lanes at the same time: a reward on another device or
    server costs no time of its own while others are longer. What comes out is the same.

    Raises:
        RewardError: if a reward fails or returns what it must not; the message names it.
    """
    lanes: dict[str, list[Scorer]] = {}
    for scorer in scorers:
        lanes.setdefault(scorer.lane, []).append(scorer)
    here, *apart = lanes.values() if lanes else [[]]
    scores: dict[str, Tensor] = {}
    with ThreadPoolExecutor(max(1, len(apart))) as pool:
        elsewhere = [pool.submit(_score_in_turn, lane, images, prompts) for lane in apart]
        scores |= _score_in_turn(here, images, prompts)
        for lane in elsewhere:
            scores |= lane.result()
    return {scorer.label: scores[scorer.label] for scorer in scorers}


def _score_in_turn(scorers: Sequence[Scorer], images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
    return {scorer.label: _score_one(scorer, images, prompts) for scorer in scorers}


def _score_one(scorer: Scorer, images: Tensor, prompts: Sequence[str]) -> Tensor:  # (N,) float32
    shown = images.data  # the same memory with a version of its own, so that who writes into it is known
    version = shown._version
    try:
        with torch.no_grad():
            given = scorer.reward.score(shown, prompts)
        contracts.check_scores(scorer.label, given, prompts)
    except AegpoError as error:
        raise RewardError(str(error)) from error.__cause__
    except Exception as error:
        if shortage.is_shortage(error):
            raise RewardError(_too_large(scorer, error)) from None
        raise RewardError(f"reward {scorer.label!r} failed with {type(error).__name__}: {error}") from error
    if shown._version != version:
        raise RewardError(
            f"reward {scorer.label!r} changed the images in place, which others still need; copy them first"
        )
    return given.detach().to(images.device)


def _too_large(scorer: Scorer, error: Exception) -> str:
    remedy = "let it score fewer images at once, or run it elsewhere: see 'aegpo serve-reward'"
    if scorer.micro_batch is not None:
        remedy = shortage.lower(f"{scorer.label}.micro_batch", scorer.micro_batch)
    return f"reward {scorer.label!r} ran out of memory ({shortage.brief(error)}); {remedy}"


class HeldOut:
    """Scores of held-out prompts, for a policy beside the untouched base.

    A reward that compares the images of one prompt has nothing to compare there but the policy's image and the base's:
    its score is the policy's against the base's.
    """

    def __init__(self, scorers: Sequence[Scorer], prompts: Sequence[str], base_images: Tensor) -> None:
        self._absolute = [scorer for scorer in scorers if not scorer.group_wise]
        self._relative = [scorer for scorer in scorers if scorer.group_wise]
        self._labels, self._prompts = [scorer.label for scorer in scorers], prompts
        # (B,) of each reward that compares nothing
        self.base_scores: Mapping[str, FloatArray] = _as_numpy(score(self._absolute, base_images, prompts))
        self._base_images = base_images.cpu() if self._relative else None

    def evaluate(self, images: Tensor) -> tuple[dict[str, FloatArray], dict[str, FloatArray]]:
        """(B, 3, h, w) in [0, 1], an image for each prompt -> (B,) of each reward, for the policy and for the base."""
        scores, base_scores = _as_numpy(score(self._absolute, images, self._prompts)), dict(self.base_scores)
        if self._base_images is not None:
            both = torch.cat([images, self._base_images.to(images.device)])
            for label, values in _as_numpy(score(self._relative, both, (*self._prompts, *self._prompts))).items():
                scores[label], base_scores[label] = values[: len(images)], values[len(images) :]
        return self._in_order(scores), self._in_order(base_scores)

    def _in_order(self, scores: Mapping[str, FloatArray]) -> dict[str, FloatArray]:
        return {label: scores[label] for label in self._labels}


def _as_numpy(scores: Mapping[str, Tensor]) -> dict[str, FloatArray]:
    return {label: values.double().cpu().numpy() for label, values in scores.items()}
