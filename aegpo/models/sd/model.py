"""Stable Diffusion 1.x in the engine."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from aegpo.core.records import Conditioning
from aegpo.models.pipeline.diffusion import VariancePreserving
from aegpo.models.pipeline.schedules import DdimSchedule


class SdFamily:
    """A UNet over x = a x0 + s noise; self-attention of the image and cross-attention to the words."""

    text_length: int | None = None  # CLIP's own

    def __init__(self, schedule: DdimSchedule, scale: float, negative_prompt: str | None, device: torch.device) -> None:
        self._diffusion = VariancePreserving(schedule, device)
        self._negative = negative_prompt
        self.scale = scale

    def embed(self, pipeline: Any, texts: list[str | None], device: torch.device) -> Conditioning:
        """CLIP's tokens; padding words take part in attention."""
        nothing = texts == [None]
        unwanted = None if self._negative is None else [self._negative]
        text, negative = pipeline.encode_prompt(
            [""] if nothing else texts, device, 1, nothing, unwanted if nothing else None
        )
        return Conditioning(negative if nothing else text)

    def predict(self, network: Any, latents: Tensor, sigma: Tensor, cond: Conditioning) -> tuple[Tensor, ...]:
        """What the UNet predicts: noise, or v."""
        known, time = self._diffusion.network_input(latents, sigma), self._diffusion.time(sigma)
        output: tuple[Tensor, ...] = network(known, time, encoder_hidden_states=cond.text, return_dict=False)
        return output

    def velocity(self, prediction: Tensor, latents: Tensor, sigma: Tensor) -> Tensor:
        """noise - x0."""
        return self._diffusion.velocity(prediction, latents, sigma)
