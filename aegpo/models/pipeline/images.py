"""From latents to images through a pipeline's VAE."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

from aegpo.models.pipeline.loading import DTYPES, load_component
from aegpo.models.pipeline.options import PipelineOptions


class Decoder:
    """A frozen VAE; a few images at a time, tiled on request. For one of videos an image is a video of one frame."""

    def __init__(self, spec: PipelineOptions, folder: Path, device: torch.device) -> None:
        vae: Any = load_component(spec, folder, "vae", getattr(diffusers, spec.vae_class), spec.vae_dtype)
        self._vae: Any = vae.to(device)
        self._slice, self._dtype, self._frames = spec.vae_slice, DTYPES[spec.vae_dtype], spec.vae_frames
        if spec.vae_tiling:
            self._vae.enable_tiling()
        config: Any = vae.config
        self.channels, self.scale = spec.latent_geometry(config)
        self._mean, self._std = _statistics(config, device)

    @torch.no_grad()
    def __call__(self, latents: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, 3, h, w) in [0, 1]."""
        raw = (latents.float() * self._std + self._mean).to(self._dtype)
        images = torch.cat([self._decoded(part) for part in torch.split(raw, self._slice)])
        return (images.float() / 2 + 0.5).clamp(0, 1)

    def _decoded(self, raw: Tensor) -> Tensor:
        decoded: Tensor = self._vae.decode(raw.unsqueeze(2) if self._frames else raw, return_dict=False)[0]
        return decoded[:, :, 0] if self._frames else decoded


def _statistics(config: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """What latents are scaled back with, as each pipeline does: raw = latents * std + mean."""
    mean, std, scaling = config.get("latents_mean"), config.get("latents_std"), config.get("scaling_factor", 1.0)
    if mean is not None and std is not None:
        spread = torch.tensor(std, device=device).view(1, -1, 1, 1) / scaling
        return torch.tensor(mean, device=device).view(1, -1, 1, 1), spread
    shift = torch.tensor(config.get("shift_factor") or 0.0, device=device)
    return shift, torch.tensor(1 / scaling, device=device)
