"""Stable Diffusion XL in the engine."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from aegpo.core.records import Conditioning
from aegpo.models.pipeline.diffusion import VariancePreserving
from aegpo.models.pipeline.schedules import DdimSchedule


class SdxlFamily:
    """SD's UNet, told the image's size and a pooled embedding too."""

    text_length: int | None = None  # CLIP's own

    def __init__(
        self, schedule: DdimSchedule, pixels: int, scale: float, negative_prompt: str | None, device: torch.device
    ) -> None:
        """`pixels`: how many a latent is wide."""
        self._diffusion = VariancePreserving(schedule, device)
        self._pixels, self._negative = pixels, negative_prompt
        self.scale = scale

    def embed(self, pipeline: Any, texts: list[str | None], device: torch.device) -> Conditioning:
        """Both CLIP models' tokens, and the second's pooled embedding; without a negative prompt, zeros."""
        nothing = texts == [None]
        text, negative, pooled, negative_pooled = pipeline.encode_prompt(
            prompt=[""] if nothing else texts,
            device=device,
            do_classifier_free_guidance=nothing,
            negative_prompt=self._negative,
        )
        return Conditioning(negative, negative_pooled) if nothing else Conditioning(text, pooled)

    def predict(self, network: Any, latents: Tensor, sigma: Tensor, cond: Conditioning) -> tuple[Tensor, ...]:
        """What the UNet predicts: noise, or v. It is told that the image is neither scaled nor cropped."""
        known, time = self._diffusion.network_input(latents, sigma), self._diffusion.time(sigma)
        size = [side * self._pixels for side in latents.shape[-2:]]
        told = torch.tensor([[*size, 0, 0, *size]], dtype=torch.float32, device=latents.device)
        added = {"text_embeds": cond.pooled, "time_ids": told.expand(len(latents), -1)}
        output: tuple[Tensor, ...] = network(
            known, time, encoder_hidden_states=cond.text, added_cond_kwargs=added, return_dict=False
        )
        return output

    def velocity(self, prediction: Tensor, latents: Tensor, sigma: Tensor) -> Tensor:
        """noise - x0."""
        return self._diffusion.velocity(prediction, latents, sigma)
