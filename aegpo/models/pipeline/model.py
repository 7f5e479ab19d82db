"""The model of every pipeline kind: seven members over what the kinds share, and one `Family` for what they do not."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import diffusers
import torch
from torch import Tensor, nn

from aegpo.attention.tap import parts_of, watch_attention
from aegpo.core.records import AttentionCall, Conditioning, Prompt
from aegpo.models.base_policy import refuse_unknown
from aegpo.models.pipeline import saving
from aegpo.models.pipeline.family import Family, Rescaling, with_size
from aegpo.models.pipeline.images import Decoder
from aegpo.models.pipeline.loading import load_component, pipeline_folder
from aegpo.models.pipeline.network import Guidance, Network, guided
from aegpo.models.pipeline.options import PipelineOptions
from aegpo.models.pipeline.prompts import PromptEncoder
from aegpo.models.pipeline.unread import UnreadNetwork


class PipelineModel:
    """A diffusers pipeline's network as a part of the engine."""

    def __init__(self, spec: PipelineOptions, device: torch.device, unread: bool = False) -> None:
        """Loads everything but the text encoders; `unread`: and but the values of the network, for `read_weights`."""
        self.spec = spec
        self._device, self._folder = device, pipeline_folder(spec)
        network_class = getattr(diffusers, spec.network_class)
        self._unread = UnreadNetwork(spec, self._folder, network_class) if unread else None
        if self._unread is None:
            network = load_component(spec, self._folder, spec.network, network_class, spec.dtype)
        else:
            network = self._unread.network
        self._family = spec.family(network, device)
        self._network = Network(network, spec, device)
        self._decoder = Decoder(spec, self._folder, device)
        length = self._family.text_length
        self._prompts = PromptEncoder(spec, self._folder, length, network, self._family.embed, device)
        self._nothing = self._prompts([None]) if self._family.scale != 1.0 else None
        self._resize(spec.height, spec.width)

    def _guided_by(self, family: Family) -> Guidance:
        nothing = None if self._nothing is None else with_size(family, self._nothing, self.height, self.width)
        rescale = family.rescale if isinstance(family, Rescaling) else None
        return Guidance(nothing, family.scale, self.spec.guidance_gradient, rescale)

    def _resize(self, height: int, width: int) -> None:
        self.spec.check_size(height, width)
        self.height, self.width = height, width
        scale = self._decoder.scale
        self.latent_shape = (self._decoder.channels, height // scale, width // scale)
        self._guidance = self._guided_by(self._family)

    @property
    def policy(self) -> nn.Module:
        """The network that is trained."""
        return self._network.policy

    def encode(self, prompts: Sequence[Prompt]) -> Conditioning:
        """Conditioning of P prompts, from the cache where it is there; else the text encoders are loaded for it."""
        return with_size(self._family, self._prompts([prompt.text for prompt in prompts]), self.height, self.width)

    def prepare(self, prompts: Sequence[Prompt]) -> None:
        """Fills the cache, so that `encode` loads no text encoder for these prompts."""
        self._prompts.prepare([prompt.text for prompt in prompts])

    def sigmas(self, steps: int) -> Tensor:  # (steps+1,)
        """The scheduler's own noise levels at this resolution."""
        levels = self.spec.noise_levels(steps, self.height, self.width)
        return torch.from_numpy(levels).float().to(self._device)

    def velocity(self, latents: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """(B, C, H, W), (B,) -> (B, C, H, W) float32, guided."""
        together = self._guidance.together(cond, self._network.watched)
        self._network.evaluations = 2 if together else 1
        prediction = guided(self._predict, latents.float(), sigma.float(), cond, self._guidance, together)
        return self._family.velocity(prediction, latents, sigma)

    def _predict(self, latents: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        return self._network.evaluate(lambda network: self._family.predict(network, latents, sigma, cond))

    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, H, W) -> images (B, 3, h, w) in [0, 1]."""
        return self._decoder(latents)

    def frozen(self, name: str) -> AbstractContextManager[None]:
        """Inside, `velocity` is the frozen base policy's, `base`; there is no other.

        Raises:
            AegpoError: for another name.
        """
        refuse_unknown(self.spec.kind, name)
        return self._network.base()

    def shard_base(self, spread: Callable[[nn.Module], None]) -> None:
        """Spreads the weights of the frozen base over processes, if it is a copy; the policy's are spread already."""
        self._network.shard_base(spread)

    def read_weights(self, network: nn.Module) -> None:
        """Gives the policy, or its copy, the values of this process's part; asked where it was built without any."""
        assert self._unread is not None, "the network was loaded with its values"
        self._unread.read_into(network)

    def tap_attention(self, tap: Callable[[AttentionCall], None]) -> AbstractContextManager[None]:
        """Shows `tap` every softmax attention, of a row for each latent; with guidance, that of both evaluations."""

        def see(call: AttentionCall) -> None:
            for part in parts_of(call, self._network.evaluations):
                tap(part)

        return self._network.watching(lambda network: watch_attention(network, see))

    def at(self, height: int, width: int) -> PipelineModel:
        """The same network, weights and all, for images of another size.

        Raises:
            AegpoError: if the network cannot paint that size.
        """
        other = copy.copy(self)
        other._resize(height, width)
        return other

    def save_adapters(self, folder: Path) -> None:
        """Writes the policy's LoRA so that `pipe.load_lora_weights(folder)` gives this policy."""
        saving.save_adapters(self.spec, self.policy, folder)

    def save_for_comfyui(self, file: Path) -> None:
        """Writes the policy's LoRA as one safetensors file that ComfyUI loads."""
        saving.save_for_comfyui(self.spec, self.policy, file)

    def save_pipeline(self, folder: Path) -> None:
        """Writes the whole pipeline with the policy in it, adapters merged, so that `from_pretrained(folder)` is it."""
        saving.save_pipeline(self.spec, self._folder, self.policy, self._network.dtypes, folder)
