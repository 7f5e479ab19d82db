"""Stable Diffusion XL in the engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from aegpo.core.records import Conditioning
from aegpo.models.pipeline.diffusion import VariancePreserving
from aegpo.models.pipeline.schedules import DdimSchedule

TIME_IDS = "time_ids"  # diffusers' name: the original size, the corner of the crop, the size wanted


class SdxlFamily:
    """SD's UNet, told the image's size and a pooled embedding too."""

    text_length: int | None = None  # CLIP's own

    def __init__(self, schedule: DdimSchedule, scale: float, negative_prompt: str | None, device: torch.device) -> None:
        self._diffusion = VariancePreserving(schedule, device)
        self._negative, self._device = negative_prompt, device
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

    def told(self, prompts: int, height: int, width: int) -> Mapping[str, Tensor]:
        """The image is as large as it is, and neither scaled nor cropped."""
        size = torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32, device=self._device)
        return {TIME_IDS: size.expand(prompts, -1)}

    def predict(self, network: Any, latents: Tensor, sigma: Tensor, cond: Conditioning) -> tuple[Tensor, ...]:
        """What the UNet predicts: noise, or v."""
        known, time = self._diffusion.network_input(latents, sigma), self._diffusion.time(sigma)
        added = {"text_embeds": cond.pooled, TIME_IDS: cond.extra[TIME_IDS]}
        output: tuple[Tensor, ...] = network(
            known, time, encoder_hidden_states=cond.text, added_cond_kwargs=added, return_dict=False
        )
        return output

    def velocity(self, prediction: Tensor, latents: Tensor, sigma: Tensor) -> Tensor:
        """noise - x0."""
        return self._diffusion.velocity(prediction, latents, sigma)
