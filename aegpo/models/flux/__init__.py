"""Model kind `flux`: FLUX.1-dev and FLUX.1-schnell."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from aegpo.core.experiment import Experiment
from aegpo.core.parts import ATTENTION_TARGETS, JOINT_BLOCKS
from aegpo.core.places import LocalOrHub
from aegpo.core.records import FloatArray
from aegpo.core.registry import Where
from aegpo.errors import AegpoError
from aegpo.models.pipeline.family import Family
from aegpo.models.pipeline.options import read_with
from aegpo.models.pipeline.packing import PATCH
from aegpo.models.pipeline.schedules import FlowSchedule, flow_schedule
from aegpo.models.pipeline.spec import PipelineSpec

if TYPE_CHECKING:
    import torch

DEV = FlowSchedule(shift=3.0, use_dynamic_shifting=True)  # scheduler_config.json of FLUX.1-dev
# transformer/config.json of FLUX.1-dev, where it is not diffusers' default
ARCHITECTURE = {"guidance_embeds": True, "joint_attention_dim": 4096, "pooled_projection_dim": 768}


class FluxSpec(PipelineSpec):
    """FLUX.1-dev and FLUX.1-schnell: a flow model with joint attention; dev has its guidance in an embedding.

    Not run with published weights or on a GPU yet: tested on small pipelines with random weights.
    """

    kind: Literal["flux"] = "flux"
    pipeline_class: ClassVar[str] = "FluxPipeline"
    network_class: ClassVar[str] = "FluxTransformer2DModel"
    architecture: ClassVar[Mapping[str, Any]] = ARCHITECTURE
    unneeded: ClassVar[tuple[str, ...]] = ("image_encoder", "feature_extractor")
    comfyui_prefix: ClassVar[str | None] = "transformer"
    attention_blocks: ClassVar[tuple[str, ...] | None] = JOINT_BLOCKS
    # Flow-GRPO's list (scripts/train_flux.py, Nov 2025): attention and feed-forward of the two-stream blocks
    adapter_targets: ClassVar[tuple[str, ...]] = (
        *(f"attn.{name}" for name in ATTENTION_TARGETS),
        "ff.net.0.proj",
        "ff.net.2",
        "ff_context.net.0.proj",
        "ff_context.net.2",
    )
    read_where: ClassVar[Mapping[str, Where]] = read_with("true_guidance")
    path: LocalOrHub = Field(
        "black-forest-labs/FLUX.1-dev", description="folder that `save_pretrained` wrote, or a hub id"
    )
    guidance: float = Field(
        3.5,
        ge=0,
        le=1000,
        description="what dev's guidance embedding is told (the pipeline's default: 3.5); schnell has none",
    )
    true_guidance: float = Field(
        1.0, ge=1, le=1000, description="classifier-free guidance with a second evaluation; 1: none, as published"
    )
    max_sequence_length: int = Field(
        512, ge=1, le=512, description="tokens T5 reads (the pipeline's default: 512; schnell: 256)"
    )

    def noise_levels(self, steps: int, height: int, width: int) -> FloatArray:  # (steps+1,)
        """The pipeline's schedule, shifted by the resolution where the scheduler says so."""
        config = self.config_at_hand("scheduler", "scheduler_config.json")
        schedule = flow_schedule(self.kind, config, DEV)
        return schedule.from_one_to_part(steps, self.tokens(height, width))

    def patch(self) -> int:
        """Latents along a side of a token."""
        return PATCH

    def call_arguments(self, steps: int, height: int, width: int) -> dict[str, Any]:
        """What an exported pipeline is called with, beside the prompt, to paint as evaluation does."""
        told = super().call_arguments(steps, height, width)
        told |= {"guidance_scale": self.guidance, "max_sequence_length": self.max_sequence_length}
        if self.true_guidance == 1.0:
            return told
        return told | {"true_cfg_scale": self.true_guidance, "negative_prompt": self.negative_prompt or ""}

    def family(self, network: Any, device: torch.device) -> Family:
        """What this kind of pipeline does its own way."""
        from aegpo.models.flux.model import FluxFamily

        return FluxFamily(
            distilled=self.guidance if network.config.guidance_embeds else None,
            scale=self.true_guidance,
            text_length=self.max_sequence_length,
            negative_prompt=self.negative_prompt,
        )

    def text_shape(self, config: Mapping[str, Any]) -> tuple[int, int, int | None]:
        """Tokens and width of the text, and width of the pooled embedding, for a network's config."""
        return self.max_sequence_length, int(config["joint_attention_dim"]), int(config["pooled_projection_dim"])

    def cautions(self, experiment: Experiment) -> Iterator[str]:
        """A guidance that the network is never told, as schnell."""
        yield from super().cautions(experiment)
        default = type(self).model_fields["guidance"].default
        if self.guidance == default:
            return
        try:
            config = self.config_at_hand(self.network)
        except AegpoError:
            return  # which `problems` says
        if config and not config.get("guidance_embeds", False):
            yield (
                f"'guidance' {self.guidance:g} has no effect: this network has no guidance embedding; remove it, or "
                "set 'true_guidance'"
            )
