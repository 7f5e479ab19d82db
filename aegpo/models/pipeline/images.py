"""From latents to images through a pipeline's VAE."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

from aegpo.models.pipeline.loading import DTYPES, load_component
from aegpo.models.pipeline.spec import PipelineSpec


class Decoder:
    """A frozen AutoencoderKL; a few images at a time, tiled on request."""

    def __init__(self, spec: PipelineSpec, folder: Path, device: torch.device) -> None:
        vae: Any = load_component(spec, folder, "vae", diffusers.AutoencoderKL, spec.vae_dtype)
        self._vae: Any = vae.to(device)
        self._slice, self._dtype = spec.vae_slice, DTYPES[spec.vae_dtype]
        if spec.vae_tiling:
            self._vae.enable_tiling()
        config: Any = vae.config
        self.channels: int = config.latent_channels
        self.scale: int = 2 ** (len(config.block_out_channels) - 1)  # pixels a latent is wide
        self._mean, self._std = _statistics(config, device)

    @torch.no_grad()
    def __call__(self, latents: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, 3, h, w) in [0, 1]."""
        raw = (latents.float() * self._std + self._mean).to(self._dtype)
        parts = [self._vae.decode(part, return_dict=False)[0] for part in torch.split(raw, self._slice)]
        return (torch.cat(parts).float() / 2 + 0.5).clamp(0, 1)


def _statistics(config: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """What latents are scaled back with, as each pipeline does: raw = latents * std + mean."""
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is not None and std is not None:
        spread = torch.tensor(std, device=device).view(1, -1, 1, 1) / config.scaling_factor
        return torch.tensor(mean, device=device).view(1, -1, 1, 1), spread
    shift = torch.tensor(config.get("shift_factor") or 0.0, device=device)
    return shift, torch.tensor(1 / config.scaling_factor, device=device)
