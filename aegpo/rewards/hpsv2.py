"""Reward `hpsv2`: Human Preference Score v2 (Wu et al. 2023, arXiv 2306.09341), batched and loaded once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from aegpo.core.interfaces import Reward
from aegpo.core.places import LocalOrHub
from aegpo.core.registry import Where
from aegpo.rewards.clip_family import LAION_HUGE, Clip, check_vocabulary, cleaned, load_words, padded
from aegpo.rewards.hpsv2_checkpoint import to_clip
from aegpo.rewards.learned import LearnedReward, LearnedRewardSpec
from aegpo.rewards.weights import find_file, read_tensors

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FILES = {"v2.0": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}  # of xswu/HPSv2, as in hpsv2.utils


class Hpsv2Reward(LearnedRewardSpec):
    """Human Preference Score v2: the cosine of image and prompt, about 0.2 to 0.4, higher is better.

    A CLIP ViT-H-14 tuned on what people prefer. The logit scale is not applied, as in the hpsv2 package: `hpsv2.score`
    returns this number, `hpsv2.evaluate` prints 100 times it. The versions are different networks with different
    scales (v2.1 is the higher); name which one you report. The package's `score` takes v2.0 where nothing is said, its
    `evaluate` v2.1; here it is v2.1.

    `backend: transformers` needs nothing but this package and ftfy. `backend: package` scores with the network,
    tokenizer and transform of hpsv2 itself, image by image in 8 bits: the same to rounding, and slower.
    """

    kind: Literal["hpsv2"] = "hpsv2"
    read_where: ClassVar[Mapping[str, Where]] = {"tokenizer": Where("backend", ("transformers",))}
    version: Literal["v2.0", "v2.1"] = Field("v2.1", description="which network (hpsv2.score's default is v2.0)")
    path: LocalOrHub = Field("xswu/HPSv2", description="the checkpoint: a file, a folder or a repository of the hub")
    tokenizer: LocalOrHub = Field(
        LAION_HUGE, description="CLIP's tokenizer: a folder or a repository of the hub; backend 'package' has its own"
    )
    backend: Literal["transformers", "package"] = Field(
        "transformers", description="whose code scores: transformers' CLIP, or the hpsv2 package"
    )

    def build(self, device: torch.device) -> Reward:
        """Loads checkpoint and tokenizer.

        Raises:
            AegpoError: if they cannot be had or do not fit, or the hpsv2 package is wanted and not installed.
        """
        who = f"reward {self.label!r}"
        tensors = read_tensors(who, find_file(who, self.path, FILES[self.version]))
        if self.backend == "package":
            from aegpo.rewards.hpsv2_package import PackageScorer

            scorer = PackageScorer(who, tensors)
            return LearnedReward(self, scorer.network, scorer.score, device)
        cleaned("")  # says what is missing before the network is built
        network = to_clip(who, tensors)
        words = load_words(who, self.tokenizer, network.config.text_config.max_position_embeddings, clean=cleaned)
        check_vocabulary(who, words, network)
        clip = Clip(network, words, padded)

        def score(images: Tensor, texts: Sequence[str]) -> Tensor:  # (b, 3, h, w), b texts -> (b,)
            return clip.cosine(images, texts)

        return LearnedReward(self, network, score, device)
