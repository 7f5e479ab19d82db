"""The embedded model: a diffusers SD3 transformer with a CLIP text encoder, in pixel space."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPTextModelWithProjection
from transformers.utils import logging as transformers_logging

from aegpo.attention.tap import watch_attention
from aegpo.core.records import AttentionCall, Conditioning, FloatArray, Prompt
from aegpo.core.weights import brief, reading_errors
from aegpo.errors import AegpoError
from aegpo.models.base_policy import BasePolicy, refuse_unknown
from aegpo.models.pipeline.network import Guidance, guided
from aegpo.models.pipeline.saving import merged

TIME_SCALE = 1000  # the transformer's time embedding takes sigma * 1000, as SD 3.5's does


class ShapesModel:
    """Latents are pixels scaled to [-1, 1]; sigma runs in equal steps; the text encoder is frozen."""

    latent_shape = (3, 24, 24)

    def __init__(
        self, folder: Path, schedule: Callable[[int], FloatArray], guidance: float, device: torch.device
    ) -> None:
        """`schedule(steps)`: the (steps+1,) noise levels of the spec."""
        needed = ("transformer/config.json", "text_encoder/config.json", "tokenizer/tokenizer.json")
        if not all((folder / name).is_file() for name in needed):
            raise AegpoError(f"no weights of model 'shapes' in {folder}; tools/train_shapes.py writes such a folder")
        self._schedule, self._guidance = schedule, guidance
        self.device = device
        transformers_logging.disable_progress_bar()  # two files of 5 MB need none
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(
                folder / "tokenizer", local_files_only=True, trust_remote_code=False
            )
            text_encoder = CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder", dtype=torch.float32)
            transformer = SD3Transformer2DModel.from_pretrained(folder / "transformer", torch_dtype=torch.float32)
        except reading_errors() as error:
            raise AegpoError(f"model 'shapes': {str(folder)!r} cannot be loaded: {brief(error)}") from error
        self.text_encoder = text_encoder.to(device).eval().requires_grad_(False)
        self._policy: nn.Module = transformer.to(device).eval()
        self._base = BasePolicy(self._policy)
        self._network = self._policy
        self._watched = False
        self._nothing = self.encode([Prompt(0, "")])

    @property
    def policy(self) -> nn.Module:
        """The transformer."""
        return self._policy

    @torch.no_grad()
    def encode(self, prompts: Sequence[Prompt]) -> Conditioning:
        """Word tokens and the pooled projection; padding takes part in attention, as in SD 3.5."""
        longest = self.text_encoder.config.max_position_embeddings
        texts = [prompt.text for prompt in prompts]
        tokens = self.tokenizer(texts, padding="max_length", max_length=longest)["input_ids"]
        too_long = next((text for text, row in zip(texts, tokens, strict=True) if len(row) > longest), None)
        if too_long is not None:
            raise AegpoError(f"prompt {too_long!r} has more than the {longest - 2} words model 'shapes' can read")
        encoded = self.text_encoder(input_ids=torch.tensor(tokens, device=self.device))
        return Conditioning(encoded.last_hidden_state, encoded.text_embeds)

    def sigmas(self, steps: int) -> Tensor:  # (steps+1,)
        """Equal steps from 1 to 0."""
        return torch.from_numpy(self._schedule(steps)).float().to(self.device)

    def velocity(self, latents: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """(B, C, H, W), (B,) -> (B, C, H, W); with guidance the unconditional branch keeps its gradient.

        Both branches are one batch, but one after the other where attention is watched: a tap sees a row a latent.
        """
        guidance = Guidance(self._nothing, self._guidance, "both")
        return guided(self._forward, latents, sigma, cond, guidance, together=not self._watched)

    def _forward(self, latents: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        output = self._network(latents, cond.text, cond.pooled, sigma * TIME_SCALE, return_dict=False)
        velocity: Tensor = output[0]
        return velocity

    def decode(self, latents: Tensor) -> Tensor:
        """(B, 3, 24, 24) in [-1, 1] -> images in [0, 1]."""
        return ((latents.float() + 1) / 2).clamp(0, 1)

    @contextmanager
    def frozen(self, name: str) -> Iterator[None]:
        """Inside, `velocity` is the frozen base policy's, `base`; there is no other.

        Raises:
            AegpoError: for another name.
        """
        refuse_unknown("shapes", name)
        with self._base.active() as network:
            before, self._network = self._network, network
            try:
                yield
            finally:
                self._network = before

    def shard_base(self, spread: Callable[[nn.Module], None]) -> None:
        """Spreads the weights of the frozen base over processes, if it is a copy; the policy's are spread already."""
        self._base.shard(spread)

    def save_adapters(self, folder: Path) -> None:
        """Refused: no program loads a LoRA of this model."""
        raise AegpoError(
            "model 'shapes' is no pipeline of diffusers, so nothing could load its LoRA; write the whole model instead "
            "(--full)"
        )

    def save_pipeline(self, folder: Path) -> None:
        """Writes a folder that the field `weights` takes, adapters merged."""
        merged(self._policy).save_pretrained(folder / "transformer")  # type: ignore[operator]
        self.text_encoder.save_pretrained(folder / "text_encoder")
        self.tokenizer.save_pretrained(folder / "tokenizer")

    @contextmanager
    def tap_attention(self, tap: Callable[[AttentionCall], None]) -> Iterator[None]:
        """Shows `tap` every joint attention."""
        before, self._watched = self._watched, True
        try:
            with watch_attention(self._network, tap):
                yield
        finally:
            self._watched = before
