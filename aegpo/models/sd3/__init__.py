"""Model kind `sd3`: Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from aegpo.core.parts import ATTENTION_TARGETS, JOINT_BLOCKS
from aegpo.core.places import LocalOrHub
from aegpo.core.records import FloatArray
from aegpo.core.registry import Where
from aegpo.models.pipeline.family import Family
from aegpo.models.pipeline.options import CLIP_TOKENS, read_with
from aegpo.models.pipeline.schedules import FlowSchedule, flow_schedule
from aegpo.models.pipeline.spec import PipelineSpec

if TYPE_CHECKING:
    import torch

PATCH, POSITIONS = 2, 384  # transformer/config.json of stable-diffusion-3.5-medium (3 and 3.5-large: 192 positions)
SHIFT = 3.0  # scheduler_config.json of stable-diffusion-3-medium and stable-diffusion-3.5-medium, -large
# transformer/config.json of stable-diffusion-3.5-medium
ARCHITECTURE = {
    "sample_size": 128,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": POSITIONS,
    "qk_norm": "rms_norm",
    "dual_attention_layers": tuple(range(13)),
}


class Sd3Spec(PipelineSpec):
    """Stable Diffusion 3 and 3.5: a flow model with joint attention of words and image, three text encoders.

    Not run with published weights or on a GPU yet: tested on small pipelines with random weights.
    """

    kind: Literal["sd3"] = "sd3"
    read_where: ClassVar[Mapping[str, Where]] = read_with("guidance")
    pipeline_class: ClassVar[str] = "StableDiffusion3Pipeline"
    network_class: ClassVar[str] = "SD3Transformer2DModel"
    architecture: ClassVar[Mapping[str, Any]] = ARCHITECTURE
    unneeded: ClassVar[tuple[str, ...]] = ("image_encoder", "feature_extractor")
    comfyui_prefix: ClassVar[str | None] = "transformer"
    attention_blocks: ClassVar[tuple[str, ...] | None] = (*JOINT_BLOCKS, "self")
    # Flow-GRPO's list (scripts/train_sd3.py, Nov 2025), which leaves out the image-only attention of 3.5
    adapter_targets: ClassVar[tuple[str, ...]] = tuple(f"attn.{name}" for name in ATTENTION_TARGETS)
    path: LocalOrHub = Field(
        "stabilityai/stable-diffusion-3.5-medium", description="folder that `save_pretrained` wrote, or a hub id"
    )
    guidance: float = Field(
        4.5, ge=1, le=1000, description="classifier-free guidance everywhere; 1: none (Flow-GRPO, SD 3.5-M: 4.5)"
    )
    max_sequence_length: int = Field(256, ge=1, le=512, description="tokens T5 reads (the pipeline's default: 256)")

    def noise_levels(self, steps: int, height: int, width: int) -> FloatArray:  # (steps+1,)
        """The pipeline's schedule; SD 3.5's shift is applied twice, as diffusers does."""
        config = self.config_at_hand("scheduler", "scheduler_config.json")
        schedule = flow_schedule(self.kind, config, FlowSchedule(shift=SHIFT))
        return schedule.from_one_to_least(steps, self.tokens(height, width))

    def patch(self) -> int:
        """Latents along a side of a token."""
        return int(self.config_at_hand("transformer").get("patch_size", PATCH))

    def most_pixels(self) -> int | None:
        """The table of positions ends there."""
        positions = int(self.config_at_hand("transformer").get("pos_embed_max_size", POSITIONS))
        return positions * self.patch() * self.pixels_per_latent()

    def call_arguments(self, steps: int, height: int, width: int) -> dict[str, Any]:
        """What an exported pipeline is called with, beside the prompt, to paint as evaluation does."""
        return super().call_arguments(steps, height, width) | {
            "guidance_scale": self.guidance,
            "max_sequence_length": self.max_sequence_length,
        }

    def family(self, network: Any, device: torch.device) -> Family:
        """What this kind of pipeline does its own way."""
        from aegpo.models.sd3.model import Sd3Family

        return Sd3Family(self.guidance, self.max_sequence_length, self.negative_prompt)

    def text_shape(self, config: Mapping[str, Any]) -> tuple[int, int, int | None]:
        """Tokens and width of the text, and width of the pooled embedding, for a network's config."""
        length = CLIP_TOKENS + self.max_sequence_length
        return length, int(config["joint_attention_dim"]), int(config["pooled_projection_dim"])
