"""Model kind `sd`: Stable Diffusion 1.x."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from aegpo.interfaces import FloatArray, Model
from aegpo.models.pipeline.schedules import DdimSchedule, ddim_schedule
from aegpo.models.pipeline.spec import PipelineSpec

if TYPE_CHECKING:
    import torch

# scheduler_config.json of stable-diffusion-v1-5 and of stable-diffusion-xl-base-1.0, as far as DDIM reads it
NOISE = DdimSchedule(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", set_alpha_to_one=False, steps_offset=1
)


class SdSpec(PipelineSpec):
    """Stable Diffusion 1.x: a UNet that predicts noise, sampled by DDIM; one text encoder.

    Also 2.x, whose UNet predicts v. Not run with published weights or on a GPU yet: tested on small pipelines with
    random weights.
    """

    kind: Literal["sd"] = "sd"
    pipeline_class: ClassVar[str] = "StableDiffusionPipeline"
    network: ClassVar[str] = "unet"
    latent_channels: ClassVar[int] = 4
    unneeded: ClassVar[tuple[str, ...]] = ("safety_checker", "feature_extractor", "image_encoder")
    attention_blocks: ClassVar[tuple[str, ...] | None] = ("self", "cross")
    partial_schedule: ClassVar[bool] = True
    adapter_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")  # DDPO's list
    path: str = Field(
        "stable-diffusion-v1-5/stable-diffusion-v1-5", description="folder that `save_pretrained` wrote, or a hub id"
    )
    guidance: float = Field(
        7.5, ge=1, description="classifier-free guidance everywhere; 1: none (the pipeline's default: 7.5; DDPO: 5)"
    )

    def schedule(self) -> DdimSchedule:
        """The noise the network was trained on, and DDIM's way through it.

        Two settings of old checkpoints are corrected as the pipeline does when it loads one.
        """
        config = self.config_at_hand("scheduler", "scheduler_config.json")
        corrected = {"clip_sample": False, "steps_offset": 1}
        return ddim_schedule(self.kind, config | corrected, NOISE) if config else NOISE

    def noise_levels(self, steps: int, height: int, width: int) -> FloatArray:  # (steps+1,)
        """DDIM's times as noise levels, the same at every resolution."""
        return self.schedule().sigmas(steps)

    def build(self, device: torch.device) -> Model:
        """Loads the UNet and the VAE; the text encoder is loaded when a prompt is not in the cache."""
        from aegpo.models.sd.model import build

        return build(self, device)
