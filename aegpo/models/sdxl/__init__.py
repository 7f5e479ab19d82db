"""Model kind `sdxl`: Stable Diffusion XL."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from aegpo.models.pipeline.schedules import DdimSchedule, ddim_schedule
from aegpo.models.pipeline.spec import CLIP_TOKENS, PipelineSpec
from aegpo.models.sd import NOISE
from aegpo.parts import Positive
from aegpo.records import FloatArray

if TYPE_CHECKING:
    import torch

    from aegpo.models.pipeline.model import Family
# unet/config.json of stable-diffusion-xl-base-1.0, where it is not diffusers' default
ARCHITECTURE = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "use_linear_projection": True,
}


class SdxlSpec(PipelineSpec):
    """Stable Diffusion XL base: a UNet that predicts noise, sampled by DDIM; two text encoders; no refiner.

    Not run with published weights or on a GPU yet: tested on small pipelines with random weights.
    """

    kind: Literal["sdxl"] = "sdxl"
    pipeline_class: ClassVar[str] = "StableDiffusionXLPipeline"
    network_class: ClassVar[str] = "UNet2DConditionModel"
    architecture: ClassVar[Mapping[str, Any]] = ARCHITECTURE
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

    def family(self, network: Any, device: torch.device) -> Family:
        """What this kind of pipeline does its own way."""
        from aegpo.models.sdxl.model import SdxlFamily

        return SdxlFamily(self, device)

    def text_shape(self, config: Mapping[str, Any]) -> tuple[int, int, int | None]:
        """Tokens and width of the text, and width of the pooled embedding, for a network's config."""
        told = int(config["projection_class_embeddings_input_dim"])
        times = 6 * int(config["addition_time_embed_dim"])
        return CLIP_TOKENS, int(config["cross_attention_dim"]), told - times
