"""Latents as tokens of 2 x 2, as FLUX, Qwen-Image and their relatives see them; imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

PATCH = 2  # latents along a side of a token


def pack(latents: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H W / 4, 4 C): a token is 2 x 2 latents, channel by channel."""
    size, channels, height, width = latents.shape
    blocks = latents.view(size, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return blocks.permute(0, 2, 4, 1, 3, 5).reshape(size, -1, channels * PATCH * PATCH)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pack`."""
    size, _, width_of_token = tokens.shape
    blocks = tokens.view(size, height // PATCH, width // PATCH, -1, PATCH, PATCH)
    return blocks.permute(0, 3, 1, 4, 2, 5).reshape(size, width_of_token // PATCH**2, height, width)
