"""Reward `diversity`: how much the images of a prompt differ, the guard against a policy that paints one for all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from aegpo.core.examples import Examples
from aegpo.core.parts import ComparedWith, RewardSpec
from aegpo.core.records import Prompt
from aegpo.rewards.groups import rows_to_compare

if TYPE_CHECKING:
    from torch import Tensor


class DiversityReward(RewardSpec):
    """How far an image is from the others of its prompt, pixel by pixel: in [0, 1], 0 if all are the same.

    Its mean over a prompt's images is their mean pairwise distance. It falls when a policy collapses to one image a
    prompt, which other rewards do not see; it says nothing of whether images are good, and noise raises it. In
    evaluations it compares a policy's own images with one another: `evaluation.images_per_prompt` must be 2 or more.
    """

    kind: Literal["diversity"] = "diversity"
    media: ClassVar[Literal["image", "video", "both"]] = "both"
    group_wise: ClassVar[bool] = True
    compared_with: ClassVar[ComparedWith] = "own"

    def examples(self) -> Examples:
        """A black and a white image, and twice the same grey."""
        low = np.full((2, 3, 8, 8), 0.5)
        high = np.stack([np.zeros((3, 8, 8)), np.ones((3, 8, 8))])
        return Examples(Prompt(0, "anything"), high, low)

    def identity(self) -> Mapping[str, Any]:
        """Scores depend on nothing but spec, images and prompts."""
        return {}

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """(N, [F,] 3, h, w) in [0, 1] and N prompts, each at least twice -> (N,) float32 in [0, 1].

        With d(x, y) = sqrt(mean((x - y)^2)), the root mean square over all pixels and channels, of videos over all
        frames too, the score of image i of a prompt's n is sum_{j != i} d(x_i, x_j) / (n - 1). The mean pairwise
        distance as a measure of diversity is BicycleGAN's (arXiv 1711.11586), which takes it in the features
        of a network (LPIPS); taking it in pixels is ours, so that it needs no network and has a closed form.

        Raises:
            AegpoError: if a prompt has a single image.
        """
        import torch

        pixels = images.flatten(start_dim=1).float()
        scores = torch.zeros(len(images), device=images.device)
        for rows in rows_to_compare(prompts, f"reward {self.label!r}").values():
            group = pixels[rows]  # (n, pixels)
            distances = torch.stack([(group - image).square().mean(dim=1).sqrt() for image in group])  # (n, n)
            scores[rows] = distances.sum(dim=1) / (len(rows) - 1)
        return scores
