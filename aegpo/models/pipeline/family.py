"""What one kind of pipeline does its own way, beside what all kinds share; imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from aegpo.core.records import Conditioning

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Family(Protocol):
    """What one kind of pipeline does its own way."""

    text_length: int | None  # tokens prompts are cut to, where that is a choice
    scale: float  # of classifier-free guidance; 1: none

    def embed(self, pipeline: Any, texts: list[str | None], device: torch.device) -> Conditioning:
        """Conditioning of texts by the pipeline's own `encode_prompt`, with a mask if some are padded.

        [None] is the absence of a prompt.
        """

    def predict(self, network: Any, latents: Tensor, sigma: Tensor, cond: Conditioning) -> tuple[Tensor, ...]:
        """What the network returns for (B, C, H, W) latents at (B,) noise levels, the prediction first."""

    def velocity(self, prediction: Tensor, latents: Tensor, sigma: Tensor) -> Tensor:
        """(B, C, H, W): d x / d sigma from the network's prediction."""


@runtime_checkable
class SizeTold(Protocol):
    """A family whose network is told the size of the image."""

    def told(self, prompts: int, height: int, width: int) -> Mapping[str, Tensor]:
        """What `Conditioning.extra` has for images of a size in pixels, beside what `embed` says: name -> (P, ...)."""


def with_size(family: Family, cond: Conditioning, height: int, width: int) -> Conditioning:
    """Conditioning for images of a size in pixels."""
    if not isinstance(family, SizeTold):
        return cond
    return replace(cond, extra={**cond.extra, **family.told(len(cond.text), height, width)})


@runtime_checkable
class Rescaling(Protocol):
    """A family whose pipeline does more to a guided prediction than classifier-free guidance."""

    def rescale(self, guided: Tensor, wanted: Tensor) -> Tensor:
        """(B, C, H, W): the guided prediction, from itself and the conditional one."""
