"""Qwen-Image in the engine."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from aegpo import AegpoError, Conditioning
from aegpo.pipelines import PATCH, pack, unpack

NOTHING = " "  # what the published examples and Flow-GRPO give where there is no negative prompt
OTHERS = ("guidance_embeds", "use_additional_t_cond", "zero_cond_t", "use_layer3d_rope")  # of relatives of Qwen-Image


class QwenImageFamily:
    """Predicts the velocity of packed latents; text tokens before image tokens, padding masked."""

    def __init__(self, network: Any, scale: float, text_length: int, negative_prompt: str | None) -> None:
        for name in OTHERS:
            if network.config.get(name):
                raise AegpoError(
                    f"model 'qwen-image': its transformer/config.json turns {name!r} on, as networks do that this "
                    "kind does not run; give the pipeline of a text-to-image Qwen-Image"
                )
        self._negative = NOTHING if negative_prompt is None else negative_prompt
        self.text_length: int | None = text_length
        self.scale = scale

    def embed(self, pipeline: Any, texts: list[str | None], device: torch.device) -> Conditioning:
        """Qwen2.5-VL's last hidden states, without those of the template's beginning."""
        text, mask = pipeline.encode_prompt(
            prompt=[self._negative] if texts == [None] else texts,
            device=device,
            max_sequence_length=self.text_length,
        )
        return Conditioning(text, mask=None if mask is None else mask.bool())

    def predict(self, network: Any, latents: Tensor, sigma: Tensor, cond: Conditioning) -> tuple[Tensor, ...]:
        """The transformer's velocity, unpacked."""
        height, width = latents.shape[-2:]
        output = network(
            hidden_states=pack(latents),
            encoder_hidden_states=cond.text,
            encoder_hidden_states_mask=cond.mask,
            timestep=sigma,
            img_shapes=[[(1, height // PATCH, width // PATCH)]] * len(latents),
            return_dict=False,
        )
        return (unpack(output[0], height, width),)

    def rescale(self, guided: Tensor, wanted: Tensor) -> Tensor:
        """Every token as long as that of the conditional prediction (diffusers' QwenImagePipeline)."""
        tokens = pack(guided)
        lengths = pack(wanted).norm(dim=-1, keepdim=True) / tokens.norm(dim=-1, keepdim=True)
        return unpack(tokens * lengths, *guided.shape[-2:])

    def velocity(self, prediction: Tensor, latents: Tensor, sigma: Tensor) -> Tensor:
        """The prediction is the velocity."""
        return prediction
