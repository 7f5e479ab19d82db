"""Stable Diffusion 3 and 3.5 in the engine."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from aegpo.core.records import Conditioning

TIMES = 1000  # the time embedding takes sigma * 1000


class Sd3Family:
    """MMDiT: predicts the velocity; image tokens before text tokens; padding words take part in attention."""

    def __init__(self, scale: float, text_length: int, negative_prompt: str | None) -> None:
        self._negative = negative_prompt
        self.text_length: int | None = text_length
        self.scale = scale

    def embed(self, pipeline: Any, texts: list[str | None], device: torch.device) -> Conditioning:
        """CLIP's 77 tokens and T5's; both CLIP models' pooled embeddings."""
        nothing = texts == [None]
        text, negative, pooled, negative_pooled = pipeline.encode_prompt(
            prompt=[""] if nothing else texts,
            prompt_2=None,
            prompt_3=None,
            device=device,
            do_classifier_free_guidance=nothing,
            negative_prompt=self._negative,
            max_sequence_length=self.text_length,
        )
        return Conditioning(negative, negative_pooled) if nothing else Conditioning(text, pooled)

    def predict(self, network: Any, latents: Tensor, sigma: Tensor, cond: Conditioning) -> tuple[Tensor, ...]:
        """The transformer's velocity."""
        output: tuple[Tensor, ...] = network(latents, cond.text, cond.pooled, sigma * TIMES, return_dict=False)
        return output

    def velocity(self, prediction: Tensor, latents: Tensor, sigma: Tensor) -> Tensor:
        """The prediction is the velocity."""
        return prediction
