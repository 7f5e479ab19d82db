"""Model kind `qwen-image`: Qwen-Image (arXiv 2508.02324), as a plugin of aegpo."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

import aegpo
from aegpo.pipelines import (
    ATTENTION_TARGETS,
    JOINT_BLOCKS,
    PATCH,
    PIXELS_PER_LATENT,
    Family,
    FlowSchedule,
    PipelineSpec,
    flow_schedule,
)

if TYPE_CHECKING:
    import torch

# scheduler_config.json of Qwen-Image
SCHEDULE = FlowSchedule(use_dynamic_shifting=True, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02)
# transformer/config.json of Qwen-Image, which is what diffusers takes by default
ARCHITECTURE = {"num_layers": 60, "joint_attention_dim": 3584}


class QwenImageSpec(PipelineSpec):
    """Qwen-Image: a flow model with joint attention of image and words, which a Qwen2.5-VL reads.

    Not run with published weights or on a GPU yet: tested on small pipelines with random weights.
    """

    kind: Literal["qwen-image"] = "qwen-image"
    read_where: ClassVar[Mapping[str, aegpo.Where]] = dict.fromkeys(
        ("negative_prompt", "guidance_gradient"), aegpo.Where("guidance", (1.0,), other=True)
    )
    pipeline_class: ClassVar[str] = "QwenImagePipeline"
    network_class: ClassVar[str] = "QwenImageTransformer2DModel"
    architecture: ClassVar[Mapping[str, Any]] = ARCHITECTURE
    network: ClassVar[str] = "transformer"
    latent_channels: ClassVar[int] = 16
    vae_class: ClassVar[str] = "AutoencoderKLQwenImage"
    vae_frames: ClassVar[bool] = True
    vae_parameters: ClassVar[int] = 126_892_531
    attention_blocks: ClassVar[tuple[str, ...] | None] = JOINT_BLOCKS
    # Flow-GRPO's list (scripts/train_qwenimage.py, Nov 2025): attention and feed-forward of image and words
    adapter_targets: ClassVar[tuple[str, ...]] = (
        *ATTENTION_TARGETS,
        "img_mlp.net.0.proj",
        "img_mlp.net.2",
        "txt_mlp.net.0.proj",
        "txt_mlp.net.2",
    )
    path: aegpo.LocalOrHub = Field(
        default="Qwen/Qwen-Image", description="folder that `save_pretrained` wrote, or a hub id"
    )
    guidance: float = Field(
        default=4.0,
        ge=1,
        le=1000,
        description="the pipeline's `true_cfg_scale`: classifier-free guidance, brought back to the conditional "
        "prediction's norm; 1: none (the pipeline's default and Flow-GRPO's: 4)",
    )
    negative_prompt: str | None = Field(
        default=None, description="what guidance steers away from; null: a single space, as published"
    )
    max_sequence_length: int = Field(
        default=512,
        ge=1,
        le=1024,
        description="tokens of a prompt that count, template apart (the pipeline's default: 512)",
    )

    def noise_levels(self, steps: int, height: int, width: int) -> aegpo.FloatArray:  # (steps+1,)
        """The pipeline's schedule, shifted by the resolution and stretched to end at its last level."""
        config = self.config_at_hand("scheduler", "scheduler_config.json")
        return flow_schedule(self.kind, config, SCHEDULE).from_one_to_part(steps, self.tokens(height, width))

    def patch(self) -> int:
        """Latents along a side of a token."""
        return PATCH

    def latent_geometry(self, config: Mapping[str, Any]) -> tuple[int, int]:
        """Channels of the latents, and pixels a latent is wide, for a VAE's config; empty: the published one's."""
        halvings = config.get("temperal_downsample")  # diffusers' spelling
        return int(config.get("z_dim", self.latent_channels)), 2 ** len(halvings) if halvings else PIXELS_PER_LATENT

    def family(self, network: Any, device: torch.device) -> Family:
        """What this kind of pipeline does its own way."""
        from aegpo_qwen_image.family import QwenImageFamily

        return QwenImageFamily(network, self.guidance, self.max_sequence_length, self.negative_prompt)

    def text_shape(self, config: Mapping[str, Any]) -> tuple[int, int, int | None]:
        """The most tokens a prompt may have, and their width; there is no pooled embedding."""
        return self.max_sequence_length, int(config["joint_attention_dim"]), None


@aegpo.hookimpl
def aegpo_register_models(registry: aegpo.Registry[aegpo.ModelSpec]) -> None:
    """Adds `qwen-image`."""
    registry.add(QwenImageSpec)
