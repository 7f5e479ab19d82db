"""What the kinds of model with a UNet have in common: Stable Diffusion 1.x and XL."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, ClassVar

from aegpo.core.records import FloatArray
from aegpo.models.pipeline.schedules import DdimSchedule, ddim_schedule
from aegpo.models.pipeline.spec import PipelineSpec

# scheduler_config.json of stable-diffusion-v1-5 and of stable-diffusion-xl-base-1.0, as far as DDIM reads it
NOISE = DdimSchedule(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", set_alpha_to_one=False, steps_offset=1
)


class UnetSpec(PipelineSpec):
    """A UNet that predicts noise, sampled by DDIM."""

    network_class: ClassVar[str] = "UNet2DConditionModel"
    network: ClassVar[str] = "unet"
    comfyui_prefix: ClassVar[str | None] = "unet"
    latent_channels: ClassVar[int] = 4
    attention_blocks: ClassVar[tuple[str, ...] | None] = ("self", "cross")
    partial_schedule: ClassVar[bool] = True
    adapter_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")  # DDPO's list, for SD 1.x

    def schedule(self) -> DdimSchedule:
        """The noise the network was trained on, and DDIM's way through it."""
        return ddim_schedule(self.kind, self.config_at_hand("scheduler", "scheduler_config.json"), NOISE)

    def noise_levels(self, steps: int, height: int, width: int) -> FloatArray:  # (steps+1,)
        """DDIM's times as noise levels, the same at every resolution."""
        return self.schedule().sigmas(steps)

    def saved_scheduler(self) -> Any:
        """DDIM, whatever scheduler the pipeline came with: the policy was trained and evaluated with it."""
        from diffusers import DDIMScheduler

        return DDIMScheduler(**asdict(self.schedule()), clip_sample=False)
