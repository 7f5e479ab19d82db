"""Model kind `sd`: Stable Diffusion 1.x."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from aegpo.core.places import LocalOrHub
from aegpo.core.registry import Where
from aegpo.models.pipeline.family import Family
from aegpo.models.pipeline.options import CLIP_TOKENS, read_with
from aegpo.models.pipeline.schedules import DdimSchedule, ddim_schedule
from aegpo.models.pipeline.unet import NOISE, UnetSpec

if TYPE_CHECKING:
    import torch

# unet/config.json of stable-diffusion-v1-5, where it is not diffusers' default
ARCHITECTURE = {"sample_size": 64, "cross_attention_dim": 768}


class SdSpec(UnetSpec):
    """Stable Diffusion 1.x: a UNet that predicts noise, sampled by DDIM; one text encoder.

    Also 2.x, whose UNet predicts v. Not run with published weights or on a GPU yet: tested on small pipelines with
    random weights.
    """

    kind: Literal["sd"] = "sd"
    read_where: ClassVar[Mapping[str, Where]] = read_with("guidance")
    pipeline_class: ClassVar[str] = "StableDiffusionPipeline"
    architecture: ClassVar[Mapping[str, Any]] = ARCHITECTURE
    unneeded: ClassVar[tuple[str, ...]] = ("safety_checker", "feature_extractor", "image_encoder")
    path: LocalOrHub = Field(
        "stable-diffusion-v1-5/stable-diffusion-v1-5", description="folder that `save_pretrained` wrote, or a hub id"
    )
    guidance: float = Field(
        7.5,
        ge=1,
        le=1000,
        description="classifier-free guidance everywhere; 1: none (the pipeline's default: 7.5; DDPO: 5)",
    )

    def schedule(self) -> DdimSchedule:
        """The noise the network was trained on, and DDIM's way through it.

        Two settings of old checkpoints are corrected as the pipeline does when it loads one.
        """
        config = self.config_at_hand("scheduler", "scheduler_config.json")
        corrected = {"clip_sample": False, "steps_offset": 1}
        return ddim_schedule(self.kind, config | corrected, NOISE) if config else NOISE

    def call_arguments(self, steps: int, height: int, width: int) -> dict[str, Any]:
        """What an exported pipeline is called with, beside the prompt, to paint as evaluation does."""
        return super().call_arguments(steps, height, width) | {"guidance_scale": self.guidance}

    def family(self, network: Any, device: torch.device) -> Family:
        """What this kind of pipeline does its own way."""
        from aegpo.models.sd.model import SdFamily

        return SdFamily(self.schedule(), self.guidance, self.negative_prompt, device)

    def text_shape(self, config: Mapping[str, Any]) -> tuple[int, int, int | None]:
        """Tokens and width of the text, and width of the pooled embedding, for a network's config."""
        return CLIP_TOKENS, int(config["cross_attention_dim"]), None
