"""A plugin from outside: a signal of its own, which drives an allocator and a selector in the box."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

import aegpo


class SettlingSignal(aegpo.SignalSpec):
    """How much the predicted image of each prompt still changes at each denoising step."""

    kind: Literal["settling"] = "settling"
    provides: ClassVar[Mapping[str, aegpo.Per]] = {"change": "prompt-step", "restlessness": "prompt"}
    seed: int = Field(0, description="start noise, fixed for each prompt")

    def cost(self, denoising_steps: int) -> aegpo.SignalCost:
        """A trajectory of the policy, whenever a prompt comes."""
        return aegpo.SignalCost(policy=denoising_steps)

    def build(self, experiment: aegpo.Experiment) -> Settling:
        return Settling(self.seed)


class Settling:
    """Follows each prompt from its start noise and compares what is predicted, step by step."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def measure(self, step: int, prompts: Sequence[aegpo.Prompt], policy: aegpo.Policy) -> aegpo.Measurement:
        """`change` (P, T) in [0, 1], mean over pixels, 0 at the first step; `restlessness` (P,), its sum."""
        import torch

        latents = policy.start_noise(prompts, self._seed)
        cond, images = policy.encode(prompts), []
        for sigma, following in zip(policy.sigmas[:-1], policy.sigmas[1:], strict=True):
            velocity = policy.velocity(latents, sigma.expand(len(latents)), cond)
            images.append(policy.decode(latents - sigma * velocity))
            latents = latents + (following - sigma) * velocity
        moved = torch.stack(images).diff(dim=0).abs().flatten(2).mean(dim=2).T.double().cpu().numpy()
        change = np.pad(moved, ((0, 0), (1, 0)))
        forwards = len(prompts) * change.shape[1]
        return aegpo.Measurement({"change": change, "restlessness": change.sum(axis=1)}, forwards)


@aegpo.hookimpl
def aegpo_register_signals(registry: aegpo.Registry[aegpo.SignalSpec]) -> None:
    registry.add(SettlingSignal)
