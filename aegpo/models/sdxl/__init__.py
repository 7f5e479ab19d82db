"""Model kind `sdxl`: Stable Diffusion XL."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from aegpo.interfaces import FloatArray, Model
from aegpo.models.pipeline.schedules import DdimSchedule, ddim_schedule
from aegpo.models.pipeline.spec import PipelineSpec
from aegpo.models.sd import NOISE
from aegpo.specs import Positive

if TYPE_CHECKING:
    import torch


class SdxlSpec(PipelineSpec):
    """Stable Diffusion XL base: a UNet that predicts noise, sampled by DDIM; two text encoders; no refiner.

    Not run with published weights or on a GPU yet: tested on small pipelines with random weights.
    """

    kind: Literal["sdxl"] = "sdxl"
    pipeline_class: ClassVar[str] = "StableDiffusionXLPipeline"
    network: ClassVar[str] = "unet"
    latent_channels: ClassVar[int] = 4
    unneeded: ClassVar[tuple[str, ...]] = ("feature_extractor", "image_encoder")
    attention_blocks: ClassVar[tuple[str, ...] | None] = ("self", "cross")
    partial_schedule: ClassVar[bool] = True
    adapter_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")  # DDPO's list, for SD 1.x
    path: str = Field(
        "stabilityai/stable-diffusion-xl-base-1.0", description="folder that `save_pretrained` wrote, or a hub id"
    )
    height: Positive = Field(1024, description="of images in training, in pixels; the network is told")
    width: Positive = Field(1024, description="of images in training, in pixels; the network is told")
    guidance: float = Field(
        5.0, ge=1, description="classifier-free guidance everywhere; 1: none (the pipeline's default: 5)"
    )

    def schedule(self) -> DdimSchedule:
        """The noise the network was trained on, and DDIM's way through it."""
        return ddim_schedule(self.kind, self.config_at_hand("scheduler", "scheduler_config.json"), NOISE)

    def noise_levels(self, steps: int, height: int, width: int) -> FloatArray:  # (steps+1,)
        """DDIM's times as noise levels, the same at every resolution."""
        return self.schedule().sigmas(steps)

    def build(self, device: torch.device) -> Model:
        """Loads the UNet and the VAE; text encoders are loaded when a prompt is not in the cache."""
        from aegpo.models.sdxl.model import build

        return build(self, device)
