"""Reward `jpeg-size`: the compressibility reward of DDPO (arXiv 2305.13301, Sec. 4.1), as a plugin of aegpo."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

import aegpo

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor


class JpegSize(aegpo.RewardSpec):
    """Bytes of the image as JPEG, negated: images that compress well score higher.

    Unit: bytes of the whole file, header included, so always below 0 (DDPO divides by 1000). The prompt is not read.
    """

    kind: Literal["jpeg-size"] = "jpeg-size"
    quality: int = Field(default=95, ge=1, le=100, description="JPEG quality (DDPO: 95)")

    def score(self, images: Tensor, prompts: Sequence[aegpo.Prompt]) -> Tensor:  # (N,) float32
        """(N, 3, h, w) in [0, 1] -> minus the bytes of each."""
        import torch
        from PIL import Image

        pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        return torch.tensor([-self.size(Image.fromarray(image)) for image in pixels], dtype=torch.float32)

    def size(self, image: Image) -> int:
        """Bytes of one image as JPEG."""
        buffer = io.BytesIO()
        image.save(buffer, format="JPEG", quality=self.quality)
        return buffer.tell()


@aegpo.hookimpl
def aegpo_register_rewards(registry: aegpo.Registry[aegpo.RewardSpec]) -> None:
    """Adds `jpeg-size`."""
    registry.add(JpegSize)
