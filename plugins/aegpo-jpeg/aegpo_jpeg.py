"""Rewards on the size of images as JPEG, as a plugin of aegpo.

`jpeg-size` is the compressibility reward of DDPO (arXiv 2305.13301, Sec. 4.1); `jpeg-target` wants the size that each
prompt names in its metadata (our own).
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

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

        return torch.tensor([-size for size in sizes(images, self.quality)], dtype=torch.float32)


TARGET = "target_bytes"


class JpegTarget(aegpo.RewardSpec):
    """Minus the distance of the image's JPEG size to the prompt's `target_bytes`, as a share of it: 0 is best.

    With s the bytes of the whole file, header included, and t the metadata `target_bytes` of the prompt, the score is
    -|s - t| / t: an empty file would score -1, one of twice the size too, and larger ones less without an end. It is a
    share so that prompts with small and with large targets weigh the same. The text is not read. The formula is ours.
    """

    kind: Literal["jpeg-target"] = "jpeg-target"
    particular: ClassVar[bool] = True
    needs_metadata: ClassVar[tuple[str, ...]] = (TARGET,)
    quality: int = Field(default=95, ge=1, le=100, description="JPEG quality (as for jpeg-size)")

    def refuses(self, prompt: aegpo.Prompt) -> str | None:
        """Why a prompt's target is none; None: it is one."""
        target = prompt.metadata.get(TARGET)
        if isinstance(target, (int, float)) and not isinstance(target, bool) and 0 < target < float("inf"):
            return None
        return f"its {TARGET!r} is {target!r}; a number of bytes above 0 was expected"

    def score(self, images: Tensor, prompts: Sequence[aegpo.Prompt]) -> Tensor:  # (N,) float32
        """(N, 3, h, w) in [0, 1] and N prompts with a target -> (N,) at most 0, higher is better.

        Raises:
            AegpoError: if a prompt's target is none.
        """
        import torch

        for prompt in prompts:
            if (why := self.refuses(prompt)) is not None:
                raise aegpo.AegpoError(f"reward {self.label!r} cannot score prompt {prompt.text!r}: {why}")
        targets = [prompt.metadata[TARGET] for prompt in prompts]
        found = zip(sizes(images, self.quality), targets, strict=True)
        return torch.tensor([-abs(size - target) / target for size, target in found], dtype=torch.float32)


def sizes(images: Tensor, quality: int) -> list[int]:  # N
    """Bytes of each image (N, 3, h, w) in [0, 1] as JPEG, header included."""
    import torch
    from PIL import Image

    pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [_size(Image.fromarray(image), quality) for image in pixels]


def _size(image: Image, quality: int) -> int:
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=quality)
    return buffer.tell()


@aegpo.hookimpl
def aegpo_register_rewards(registry: aegpo.Registry[aegpo.RewardSpec]) -> None:
    """Adds `jpeg-size` and `jpeg-target`."""
    registry.add(JpegSize)
    registry.add(JpegTarget)
