"""The entropy probe: what turns attention entropies along trajectories into the signals of a training step."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor

from aegpo.entropy import attention_entropy, blocks_of, measure_call
from aegpo.errors import AegpoError
from aegpo.interfaces import AttentionCall, Conditioning, FloatArray, Model, Prompt
from aegpo.rollouts import Velocity, start_latents
from aegpo.samplers import euler
from aegpo.specs import ProbeSpec


def call_entropy(call: AttentionCall, probe: ProbeSpec) -> Tensor | None:
    """Mean entropy (B,) of one attention call over the probe's rows and all heads; None if the block is not in it."""
    if probe.rows is None:
        found = measure_call(call, [probe.block], masses=False)
        return found[probe.block].entropy.mean(dim=1) if found else None
    if probe.block not in blocks_of(call):
        return None
    whole, part = slice(None), {"image-text": call.text, "image-image": call.image}
    rows, keys = (call.image if probe.block in part else whole), part.get(probe.block, whole)
    query, key = call.query[:, :, rows], call.key[:, :, keys]
    mask = None
    if call.mask is not None:
        mask = call.mask.expand(*call.query.shape[:3], call.key.shape[2])[:, :, rows, keys]
    chosen = torch.linspace(0, query.shape[2] - 1, min(probe.rows, query.shape[2]), device=query.device).round().long()
    return attention_entropy(query, key, scale=call.scale, mask=mask, rows=chosen).mean(dim=(1, 2))


class EntropyProbe:
    """Measures Entropy(t) of prompts along one deterministic trajectory each.

    A prompt's start noise is fixed for the whole run, so that changes of entropy are changes of the policy. The base
    policy never changes: its entropies are measured once for each prompt and kept, in checkpoints too.
    """

    def __init__(self, model: Model, spec: ProbeSpec, sigmas: Tensor, velocity: Velocity | None = None) -> None:
        self._model, self._spec, self._sigmas = model, spec, sigmas
        self._velocity = velocity or model.velocity  # the run's, in its precision
        self._base: dict[int, FloatArray] = {}

    def measure(self, prompts: Sequence[Prompt], cond: Conditioning) -> tuple[FloatArray, FloatArray, int]:
        """Policy and base entropies, (P, T) nats each, and the velocity evaluations this took."""
        entropy = self._trajectories(prompts, cond, base=False)
        missing = [row for row, prompt in enumerate(prompts) if prompt.index not in self._base]
        if missing:
            rows = torch.tensor(missing, device=cond.text.device)
            fresh = self._trajectories([prompts[row] for row in missing], cond.select(rows), base=True)
            self._base.update({prompts[row].index: curve for row, curve in zip(missing, fresh, strict=True)})
        base = np.stack([self._base[prompt.index] for prompt in prompts])
        return entropy, base, (len(prompts) + len(missing)) * (len(self._sigmas) - 1)

    @torch.no_grad()
    def _trajectories(self, prompts: Sequence[Prompt], cond: Conditioning, base: bool) -> FloatArray:  # (P, T)
        noise = torch.stack([self._start(prompt) for prompt in prompts]).to(cond.text.device)
        latents = start_latents(noise, self._sigmas)
        curves: list[Tensor] = []
        for sigma, sigma_next in zip(self._sigmas[:-1], self._sigmas[1:], strict=True):
            found: list[Tensor] = []

            def tap(call: AttentionCall, found: list[Tensor] = found) -> None:
                value = call_entropy(call, self._spec)
                if value is not None:
                    found.append(value)

            before = sigma.expand(len(prompts))
            with self._model.base() if base else nullcontext(), self._model.tap_attention(tap):
                velocity = self._velocity(latents, before, cond)
            if not found:
                raise AegpoError(
                    f"probe: the network has no {self._spec.block!r} softmax attention to measure; choose another "
                    "'block' (joint, image-text, image-image for transformers such as SD3; self, cross for UNets)"
                )
            curves.append(torch.stack(found).mean(dim=0))
            latents = euler(latents, velocity, before, sigma_next.expand(len(prompts)))
        return torch.stack(curves, dim=1).double().cpu().numpy()

    def _start(self, prompt: Prompt) -> Tensor:  # (C, H, W)
        generator = torch.Generator().manual_seed(self._spec.seed * 1_000_003 + prompt.index)
        return torch.randn(self._model.latent_shape, generator=generator)

    def state_dict(self) -> dict[str, Tensor]:
        """Base entropies by prompt."""
        if not self._base:
            return {}
        index = torch.tensor(list(self._base))
        return {"index": index, "entropy": torch.from_numpy(np.stack(list(self._base.values())))}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes back what `state_dict` returned."""
        index = state["index"].tolist() if state else []
        self._base = {prompt: state["entropy"][row].numpy() for row, prompt in enumerate(index)}
