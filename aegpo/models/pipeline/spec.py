"""The fields every model kind that reads a diffusers pipeline has; imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from aegpo.interfaces import FloatArray
from aegpo.models.pipeline.source import component_config, folder_at_hand
from aegpo.specs import ModelSpec, Positive

PIXELS_PER_LATENT = 8  # of every published VAE here


class PipelineSpec(ModelSpec):
    """A network out of a pipeline that `save_pretrained` wrote, or of one on the hub."""

    pipeline_class: ClassVar[str]  # in diffusers, and what model_index.json says
    network: ClassVar[str]  # the component that is trained: transformer, unet
    unneeded: ClassVar[tuple[str, ...]] = ()  # components of the pipeline that nothing here reads

    path: str = Field(description="folder that `save_pretrained` wrote, or a hub id such as org/name")
    revision: str | None = Field(None, description="branch, tag or commit of a hub id; null: the main branch")
    variant: str | None = Field(None, description="weights with this suffix, e.g. fp16; null: those without one")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "bfloat16",
        description="of frozen weights and of the network's arithmetic; trained weights, latents, noise levels and "
        "log-probabilities are float32 all the same",
    )
    height: Positive = Field(512, description="of images in training, in pixels")
    width: Positive = Field(512, description="of images in training, in pixels")
    negative_prompt: str | None = Field(
        None, description="what guidance steers away from; null: what the pipeline does without one"
    )
    guidance_gradient: Literal["both", "conditional"] = Field(
        "both",
        description="which evaluation of guidance learns: both, in one batch (Flow-GRPO since Nov 2025), or the "
        "conditional one alone, the other detached (Flow-GRPO, Jul 2025)",
    )
    vae_dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="of the image decoder")
    vae_slice: Positive = Field(4, description="images decoded at a time")
    vae_tiling: bool = Field(False, description="decode large images in overlapping tiles: less memory, faint seams")
    gradient_checkpointing: bool = Field(
        True, description="compute activations again in the backward pass: a fraction of the memory, a third more time"
    )
    compile: bool = Field(False, description="torch.compile of the trained network; the probe and the base run eager")
    offload_base: bool = Field(
        False, description="full fine-tuning: the frozen copy waits in CPU memory and moves over when it is needed"
    )
    cache: Path | None = Field(
        None, description="folder of prompt embeddings; null: $AEGPO_CACHE, else $XDG_CACHE_HOME/aegpo, ~/.cache/aegpo"
    )

    def noise_levels(self, steps: int, height: int, width: int) -> FloatArray:
        """(steps+1,) noise levels of images of height x width pixels, as the pipeline's own scheduler has them."""
        raise NotImplementedError(f"model {self.kind!r} does not define noise_levels(steps, height, width)")

    def sigmas(self, steps: int) -> FloatArray:  # (steps+1,)
        """The noise levels of training."""
        return self.noise_levels(steps, self.height, self.width)

    def config_at_hand(self, component: str, file: str = "config.json") -> dict[str, Any]:
        """What a component's JSON says; empty where a hub id has not been downloaded."""
        folder = folder_at_hand(self.path, self.revision)
        return {} if folder is None else component_config(self.kind, folder, component, file)

    def pixels_per_latent(self) -> int:
        """How many pixels a latent is wide."""
        blocks = self.config_at_hand("vae").get("block_out_channels")
        return 2 ** (len(blocks) - 1) if blocks else PIXELS_PER_LATENT

    def tokens(self, height: int, width: int, patch: int) -> int:
        """Image tokens of height x width pixels where a token is patch x patch latents."""
        pixels = self.pixels_per_latent() * patch
        return (height // pixels) * (width // pixels)
