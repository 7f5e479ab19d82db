"""The fields of every model kind that reads a diffusers pipeline, and what its files say of them; imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from aegpo.core.experiment import Experiment
from aegpo.core.parts import ModelSpec
from aegpo.core.places import LocalOrHub
from aegpo.core.records import FloatArray
from aegpo.core.registry import Where
from aegpo.core.sections import Positive
from aegpo.errors import AegpoError
from aegpo.models.pipeline.family import Family
from aegpo.models.pipeline.source import check_class, component_config, folder_at_hand, local_folder, missing_compiler

if TYPE_CHECKING:
    import torch

PIXELS_PER_LATENT = 8  # of every published VAE here
CLIP_TOKENS = 77  # of every published CLIP here
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}  # of a number


def read_with(guidance: str) -> dict[str, Where]:
    """What only classifier-free guidance reads, for a spec whose field of that name is its scale, 1 for none."""
    return dict.fromkeys(("negative_prompt", "guidance_gradient"), Where(guidance, (1.0,), other=True))


class PipelineOptions(ModelSpec):
    """What a `PipelineSpec` says, without what is built from it: all that loading, saving and painting read."""

    pipeline_class: ClassVar[str]  # in diffusers, and what model_index.json says
    network_class: ClassVar[str]  # in diffusers
    architecture: ClassVar[Mapping[str, Any]]  # the published network's config, for estimates before a download
    network: ClassVar[str] = "transformer"  # the component that is trained: transformer, unet
    latent_channels: ClassVar[int] = 16  # of the published VAE
    vae_class: ClassVar[str] = "AutoencoderKL"  # in diffusers
    vae_frames: ClassVar[bool] = False  # the VAE is one of videos
    vae_parameters: ClassVar[int] = 84_000_000  # of every published AutoencoderKL here, 83.65 to 83.82 million
    unneeded: ClassVar[tuple[str, ...]] = ()  # components of the pipeline that nothing here reads
    comfyui_prefix: ClassVar[str | None] = None  # of a LoRA's names for ComfyUI: unet, transformer; None: not verified

    path: LocalOrHub = Field(description="folder that `save_pretrained` wrote, or a hub id such as org/name")
    revision: str | None = Field(default=None, description="branch, tag or commit of a hub id; null: the main branch")
    variant: str | None = Field(
        default=None, description="weights with this suffix, e.g. fp16; null: those without one"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="bfloat16",
        description="of frozen weights and of the network's arithmetic; trained weights, latents, noise levels and "
        "log-probabilities are float32 all the same",
    )
    height: Positive = Field(default=512, description="of images in training, in pixels")
    width: Positive = Field(default=512, description="of images in training, in pixels")
    negative_prompt: str | None = Field(
        default=None, description="what guidance steers away from; null: what the pipeline does without one"
    )
    guidance_gradient: Literal["both", "conditional"] = Field(
        default="both",
        description="which evaluation of guidance learns: both, in one batch (Flow-GRPO since Nov 2025), or the "
        "conditional one alone, the other detached (Flow-GRPO, Jul 2025)",
    )
    vae_dtype: Literal["float32", "bfloat16", "float16"] = Field(default="float32", description="of the image decoder")
    vae_slice: Positive = Field(default=4, description="images decoded at a time")
    vae_tiling: bool = Field(
        default=False, description="decode large images in overlapping tiles: less memory, faint seams"
    )
    gradient_checkpointing: Literal["auto"] | bool = Field(
        default="auto",
        description="compute activations again in the backward pass: a fraction of the memory, a third more time, the "
        "same results. auto: when a run starts, false if by estimate a training step fits the memory that is free "
        "without it, else true; the run says which, and `aegpo check` from what memory on it is false",
    )
    compile: bool = Field(
        default=False,
        description="torch.compile of the network's repeated blocks, at their first call; the probe and a fully "
        "fine-tuned network's base run eager; needs a C++ compiler; on a GPU, SD 3.5's had not compiled after a minute",
    )
    offload_base: bool = Field(
        default=False,
        description="full fine-tuning: the frozen copy waits in CPU memory and moves over when it is needed",
    )
    cache: Path | None = Field(
        default=None,
        description="folder of prompt embeddings; null: $AEGPO_CACHE, else $XDG_CACHE_HOME/aegpo, ~/.cache/aegpo",
    )

    def noise_levels(self, steps: int, height: int, width: int) -> FloatArray:
        """(steps+1,) noise levels of images of height x width pixels, as the pipeline's own scheduler has them."""
        raise NotImplementedError(f"model {self.kind!r} does not define noise_levels(steps, height, width)")

    def family(self, network: Any, device: torch.device) -> Family:
        """What this kind of pipeline does its own way; `network` is the one to be trained."""
        raise NotImplementedError(f"model {self.kind!r} does not define family(network, device)")

    def text_shape(self, config: Mapping[str, Any]) -> tuple[int, int, int | None]:
        """Tokens and width of the text, and width of the pooled embedding, for a network's config."""
        raise NotImplementedError(f"model {self.kind!r} does not define text_shape(config)")

    def saved_scheduler(self) -> Any:
        """diffusers' scheduler that paints as evaluation does, for an exported pipeline; None: the pipeline's own."""
        return None

    def call_arguments(self, steps: int, height: int, width: int) -> dict[str, Any]:
        """What an exported pipeline is called with, beside the prompt, to paint as evaluation does."""
        unwanted = {} if self.negative_prompt is None else {"negative_prompt": self.negative_prompt}
        return {"num_inference_steps": steps, "height": height, "width": width, **unwanted}

    def patch(self) -> int:
        """Latents along a side of what the network sees as one token."""
        return 1

    def most_pixels(self) -> int | None:
        """Pixels along a side that the network has positions for; None: any number."""
        return None

    def sigmas(self, steps: int) -> FloatArray:  # (steps+1,)
        """The noise levels of training."""
        return self.noise_levels(steps, self.height, self.width)

    @property
    def base_folder(self) -> Path | None:
        """The folder of the pipeline; None where a hub id has not been downloaded."""
        return folder_at_hand(self.path, self.revision)

    @property
    def dimensions(self) -> int | None:
        """C x H x W of the latents; None where the VAE's config cannot be read, which `problems` says."""
        try:
            pixels = self.pixels_per_latent()
        except AegpoError:
            return None
        return self.channels() * (self.height // pixels) * (self.width // pixels)

    @property
    def encoding_bytes(self) -> int | None:
        """One prompt's embeddings without padding left out; None where the network's config cannot be read."""
        try:
            config = self.config_at_hand(self.network) or self.architecture
        except AegpoError:
            return None
        length, width, pooled = self.text_shape(config)
        return (length * width + (pooled or 0)) * BYTES[self.dtype]

    def config_at_hand(self, component: str, file: str = "config.json") -> dict[str, Any]:
        """What a component's JSON says; empty where a hub id has not been downloaded."""
        folder = folder_at_hand(self.path, self.revision)
        return {} if folder is None else component_config(self.kind, folder, component, file)

    def latent_geometry(self, config: Mapping[str, Any]) -> tuple[int, int]:
        """Channels of the latents, and pixels a latent is wide, for a VAE's config; empty: the published one's."""
        blocks = config.get("block_out_channels")
        channels = int(config.get("latent_channels", self.latent_channels))
        return channels, 2 ** (len(blocks) - 1) if blocks else PIXELS_PER_LATENT

    def channels(self) -> int:
        """Channels of the latents."""
        return self.latent_geometry(self.config_at_hand("vae"))[0]

    def pixels_per_latent(self) -> int:
        """How many pixels a latent is wide."""
        return self.latent_geometry(self.config_at_hand("vae"))[1]

    def tokens(self, height: int, width: int) -> int:
        """Image tokens of height x width pixels."""
        pixels = self.pixels_per_latent() * self.patch()
        return (height // pixels) * (width // pixels)

    def check_size(self, height: int, width: int) -> None:
        """Images of this size can be painted.

        Raises:
            AegpoError: if not, with the nearest sizes that can.
        """
        multiple, most = self.pixels_per_latent() * self.patch(), self.most_pixels()
        for name, given in (("height", height), ("width", width)):
            if given % multiple:
                below = given // multiple * multiple
                valid = " and ".join(str(value) for value in (below, below + multiple) if value)
                raise AegpoError(
                    f"model {self.kind!r}: {name!r} {given} is no multiple of {multiple}; nearest that are: {valid}"
                )
            if most is not None and given > most:
                raise AegpoError(
                    f"model {self.kind!r}: {name!r} {given} is more than the {most} pixels the network has positions "
                    "for; choose at most that"
                )

    def _check_steps(self, steps: int) -> None:
        levels = self.sigmas(steps)
        if not bool((levels[1:] < levels[:-1]).all()):
            raise AegpoError(
                f"model {self.kind!r}: its scheduler gives {steps} denoising steps noise levels that do not fall at "
                "each of them; take fewer, or another 'timestep_spacing' in its scheduler_config.json"
            )

    def problems(self, experiment: Experiment) -> Iterator[str]:
        """What can be seen without loading: where the pipeline is, its class, its scheduler, and the sizes."""
        try:
            local_folder(self.kind, self.path)
            folder = folder_at_hand(self.path, self.revision)
            if folder is not None:
                check_class(self.kind, self.path, folder, self.pipeline_class)
            training, evaluation = experiment.rollouts.denoising_steps, experiment.evaluation
            self.check_size(self.height, self.width)
            self.check_size(evaluation.height or self.height, evaluation.width or self.width)
            for steps in dict.fromkeys((training, evaluation.denoising_steps or training)):
                self._check_steps(steps)
        except AegpoError as error:
            yield str(error)
        if self.offload_base and experiment.parallel.weights == "sharded" and experiment.policy.train == "full":
            yield (
                f"model {self.kind!r}: 'offload_base: true' goes with no 'parallel.weights: sharded', where each "
                "process has a part of the frozen copy on its GPU; write 'offload_base: false', or "
                "'parallel.weights: whole'"
            )
        if self.compile and (missing := missing_compiler()) is not None:
            yield f"model {self.kind!r}: {missing}"

    def cautions(self, experiment: Experiment) -> Iterator[str]:
        """What a folder, adapters or a network without an input for it leave without effect."""
        if self.revision is not None and Path(self.path).expanduser().is_dir():
            yield f"'revision' {self.revision!r} has no effect: 'path' is a folder, which has no revisions; remove it"
        if self.offload_base and experiment.policy.train == "lora":
            yield "'offload_base' has no effect under 'policy.train: lora', which keeps no frozen copy; remove it"
