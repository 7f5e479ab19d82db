"""The network of a pipeline: trained, frozen, compiled or watched, always called in the same precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from aegpo.core.records import Conditioning
from aegpo.models.base_policy import BasePolicy
from aegpo.models.pipeline.compiling import compile_blocks, eagerly
from aegpo.models.pipeline.loading import DTYPES
from aegpo.models.pipeline.options import PipelineOptions
from aegpo.models.pipeline.texts import joined
from aegpo.models.unread import is_unread

Predict = Callable[[Tensor, Tensor, Conditioning], Tensor]


class Network:
    """Calls the policy, or its frozen base inside `base`, under autocast to the spec's dtype.

    Inputs are float32, so noise levels are exact whatever the dtype of the weights is (but for FLUX, which rounds the
    time to its own dtype, in diffusers' pipeline too). Inside `watching`, evaluations are made eagerly.
    """

    def __init__(self, policy: nn.Module, spec: PipelineOptions, device: torch.device) -> None:
        self.policy = policy if is_unread(policy) else policy.to(device)
        if spec.gradient_checkpointing is not False:  # auto, if nobody has settled it: what needs less
            policy.enable_gradient_checkpointing()  # type: ignore[operator]
        self._dtype, self._device = DTYPES[spec.dtype], device
        waits_on = torch.device("cpu") if spec.offload_base else device
        self._base = BasePolicy(policy, waits_on)
        self.dtypes = self._base.dtypes  # as loaded
        self._compiled = spec.compile
        if self._compiled:
            compile_blocks(policy)
        self._called: nn.Module = policy
        self.watched, self.evaluations = False, 1  # of each latent, in one batch

    def evaluate(self, call: Callable[[Any], Any]) -> Tensor:
        """The first output of `call(network)`, float32."""
        precision: AbstractContextManager[Any] = nullcontext()
        if self._dtype != torch.float32:
            precision = torch.autocast(self._device.type, dtype=self._dtype)
        with precision:
            output: Tensor = call(self._called)[0]
        return output.float()

    def shard_base(self, spread: Callable[[nn.Module], None]) -> None:
        """Of `PipelineModel`."""
        self._base.shard(spread)

    @contextmanager
    def base(self) -> Iterator[None]:
        """Inside, `evaluate` calls the frozen base policy."""
        with self._base.active() as network:
            before, self._called = self._called, network
            try:
                yield
            finally:
                self._called = before

    @contextmanager
    def watching(self, watch: Callable[[nn.Module], AbstractContextManager[None]]) -> Iterator[None]:
        """Inside, `watch(network)` is active, and every evaluation is eager and passes it."""
        before, self.watched = self.watched, True
        try:
            with eagerly() if self._compiled else nullcontext(), watch(self._called):
                yield
        finally:
            self.watched = before


@dataclass(frozen=True)
class Guidance:
    """How predictions are steered."""

    nothing: Conditioning | None  # one row, what guidance steers away from; None without guidance
    scale: float  # 1 is no guidance
    gradient: Literal["both", "conditional"]  # `conditional` detaches the evaluation of `nothing`
    rescale: Callable[[Tensor, Tensor], Tensor] | None = None  # what is done to the outcome; see `Rescaling`

    def together(self, cond: Conditioning, watched: bool) -> bool:
        """True if both evaluations go through the network in one batch.

        Where attention is watched, not if that made texts longer: words that pad would be seen.
        """
        if self.nothing is None or self.scale == 1.0 or self.gradient != "both":
            return False
        return not watched or self.nothing.text.shape[1] == cond.text.shape[1]


def guided(
    predict: Predict, latents: Tensor, sigma: Tensor, cond: Conditioning, guidance: Guidance, together: bool
) -> Tensor:
    """Classifier-free guidance (arXiv 2207.12598): nothing + scale (cond - nothing), of what the network predicts.

    Args:
        predict: the network's prediction for (B, C, H, W), (B,) and conditioning.
        latents: (B, C, H, W).
        sigma: (B,).
        cond: of the latents.
        guidance: what to steer away from, and how far.
        together: evaluate both in one batch, those of `nothing` first, as `Guidance.together` allows; else one after
            the other.
    """
    nothing, both = guidance.nothing, guidance.gradient == "both"
    if nothing is None or guidance.scale == 1.0:
        return predict(latents, sigma, cond)
    rows = nothing.select(torch.zeros(len(latents), dtype=torch.long, device=latents.device))
    if not together:
        wanted = predict(latents, sigma, cond)
        with torch.set_grad_enabled(torch.is_grad_enabled() and both):
            unwanted = predict(latents, sigma, rows)
    else:
        pair = predict(torch.cat([latents] * 2), torch.cat([sigma] * 2), joined([rows, cond]))
        unwanted, wanted = pair.chunk(2)
    steered = unwanted + guidance.scale * (wanted - unwanted)
    return steered if guidance.rescale is None else guidance.rescale(steered, wanted)
