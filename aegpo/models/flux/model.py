"""FLUX.1 in the engine."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from aegpo.core.records import Conditioning
from aegpo.models.pipeline.packing import PATCH, pack, unpack


class FluxFamily:
    """Predicts the velocity of packed latents; text tokens before image tokens."""

    def __init__(self, distilled: float | None, scale: float, text_length: int, negative_prompt: str | None) -> None:
        """`distilled`: what the network's guidance embedding is told, None where it has none."""
        self._distilled, self._negative = distilled, negative_prompt or ""
        self.text_length: int | None = text_length
        self.scale = scale

    def embed(self, pipeline: Any, texts: list[str | None], device: torch.device) -> Conditioning:
        """T5's tokens and CLIP's pooled embedding; the absence of a prompt is the negative or the empty one."""
        text, pooled, _ = pipeline.encode_prompt(
            prompt=[self._negative] if texts == [None] else texts,
            device=device,
            max_sequence_length=self.text_length,
        )
        return Conditioning(text, pooled)

    def predict(self, network: Any, latents: Tensor, sigma: Tensor, cond: Conditioning) -> tuple[Tensor, ...]:
        """The transformer's velocity, unpacked."""
        size, (height, width) = len(latents), latents.shape[-2:]
        told = self._distilled
        output = network(
            hidden_states=pack(latents),
            timestep=sigma,
            guidance=None if told is None else torch.full((size,), told, device=latents.device),
            pooled_projections=cond.pooled,
            encoder_hidden_states=cond.text,
            txt_ids=torch.zeros(cond.text.shape[1], 3, device=latents.device),
            img_ids=positions(height // PATCH, width // PATCH, latents.device),
            return_dict=False,
        )
        return (unpack(output[0], height, width),)

    def velocity(self, prediction: Tensor, latents: Tensor, sigma: Tensor) -> Tensor:
        """The prediction is the velocity."""
        return prediction


def positions(rows: int, columns: int, device: torch.device) -> Tensor:
    """(rows * columns, 3): nothing, row and column of each image token."""
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack([torch.zeros_like(row), row, column], dim=-1).view(-1, 3).float().to(device)
