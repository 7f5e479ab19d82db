"""Reward `clip`: how near an image is to its prompt for a CLIP network (Hessel et al. 2021, arXiv 2104.08718)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from aegpo.core.places import LocalOrHub
from aegpo.rewards.clip_family import OPENAI_LARGE, load_with_words
from aegpo.rewards.learned import LearnedReward, LearnedRewardSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class ClipReward(LearnedRewardSpec):
    """CLIP score: 100 x the cosine of image and prompt, about 15 to 40, higher is better.

    The paper clamps at 0 and multiplies by 2.5, torchmetrics by 100 and clamps; here nothing is clamped, so that a
    group of bad images still has an order. `factor: 1` gives the bare cosine.
    """

    kind: Literal["clip"] = "clip"
    path: LocalOrHub = Field(
        OPENAI_LARGE, description="CLIP network with its tokenizer: a folder or a repository of the hub"
    )
    factor: float = Field(100.0, gt=0, le=1e6, description="multiplies the cosine (torchmetrics: 100; the paper: 2.5)")

    def build(self, device: torch.device) -> LearnedReward:
        """Loads network and tokenizer.

        Raises:
            AegpoError: if they cannot be had or do not fit.
        """
        clip = load_with_words(f"reward {self.label!r}", self.path, self.path, field="path")

        def score(images: Tensor, texts: Sequence[str]) -> Tensor:  # (b, 3, h, w), b texts -> (b,)
            return self.factor * clip.cosine(images, texts)

        return LearnedReward(self, clip.network, score, device)
