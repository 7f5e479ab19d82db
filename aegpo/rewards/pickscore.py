"""Reward `pickscore`: which image people pick for a prompt (Kirstain et al. 2023, arXiv 2305.01569)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from aegpo.core.places import LocalOrHub
from aegpo.rewards.clip_family import LAION_HUGE, load_with_words
from aegpo.rewards.learned import LearnedReward, LearnedRewardSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class PickScoreReward(LearnedRewardSpec):
    """PickScore: logit scale x cosine of image and prompt, about 16 to 26, higher is better.

    The scale is the model card's. Flow-GRPO trains on it divided by 26: `divisor: 26`. A difference of 1 means that
    people pick the better image e times as often as the other (a softmax over the scores).
    """

    kind: Literal["pickscore"] = "pickscore"
    path: LocalOrHub = Field(
        "yuvalkirstain/PickScore_v1", description="the network: a folder or a repository of the hub"
    )
    tokenizer: LocalOrHub = Field(LAION_HUGE, description="CLIP's tokenizer: a folder or a repository of the hub")
    divisor: float = Field(1.0, gt=0, le=1e6, description="divides the score (Flow-GRPO: 26)")

    def build(self, device: torch.device) -> LearnedReward:
        """Loads network and tokenizer.

        Raises:
            AegpoError: if they cannot be had or do not fit.
        """
        clip = load_with_words(f"reward {self.label!r}", self.path, self.tokenizer)

        def score(images: Tensor, texts: Sequence[str]) -> Tensor:  # (b, 3, h, w), b texts -> (b,)
            scale: Tensor = clip.network.logit_scale.float().exp()
            return scale / self.divisor * clip.cosine(images, texts)

        return LearnedReward(self, clip.network, score, device)
