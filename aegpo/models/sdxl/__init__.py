"""Model kind `sdxl`: Stable Diffusion XL."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from aegpo.core.places import LocalOrHub
from aegpo.core.registry import Where
from aegpo.core.sections import Positive
from aegpo.models.pipeline.family import Family
from aegpo.models.pipeline.options import CLIP_TOKENS, read_with
from aegpo.models.pipeline.unet import UnetSpec

if TYPE_CHECKING:
    import torch

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


class SdxlSpec(UnetSpec):
    """Stable Diffusion XL base: a UNet that predicts noise, sampled by DDIM; two text encoders; no refiner.

    Not run with published weights or on a GPU yet: tested on small pipelines with random weights.
    """

    kind: Literal["sdxl"] = "sdxl"
    read_where: ClassVar[Mapping[str, Where]] = read_with("guidance")
    pipeline_class: ClassVar[str] = "StableDiffusionXLPipeline"
    architecture: ClassVar[Mapping[str, Any]] = ARCHITECTURE
    unneeded: ClassVar[tuple[str, ...]] = ("feature_extractor", "image_encoder")
    path: LocalOrHub = Field(
        "stabilityai/stable-diffusion-xl-base-1.0", description="folder that `save_pretrained` wrote, or a hub id"
    )
    height: Positive = Field(1024, description="of images in training, in pixels; the network is told")
    width: Positive = Field(1024, description="of images in training, in pixels; the network is told")
    guidance: float = Field(
        5.0, ge=1, le=1000, description="classifier-free guidance everywhere; 1: none (the pipeline's default: 5)"
    )

    def call_arguments(self, steps: int, height: int, width: int) -> dict[str, Any]:
        """What an exported pipeline is called with, beside the prompt, to paint as evaluation does."""
        return super().call_arguments(steps, height, width) | {"guidance_scale": self.guidance}

    def family(self, network: Any, device: torch.device) -> Family:
        """What this kind of pipeline does its own way."""
        from aegpo.models.sdxl.model import SdxlFamily

        return SdxlFamily(self.schedule(), self.guidance, self.negative_prompt, device)

    def text_shape(self, config: Mapping[str, Any]) -> tuple[int, int, int | None]:
        """Tokens and width of the text, and width of the pooled embedding, for a network's config."""
        told = int(config["projection_class_embeddings_input_dim"])
        times = 6 * int(config["addition_time_embed_dim"])
        return CLIP_TOKENS, int(config["cross_attention_dim"]), told - times
