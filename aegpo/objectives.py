"""Losses of trained transitions; the engine weighs, sums and normalises them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from aegpo.interfaces import Update
from aegpo.specs import ObjectiveSpec

if TYPE_CHECKING:
    from torch import Tensor


class ClippedObjective(ObjectiveSpec):
    """PPO's clipped surrogate on every transition, with an optional KL penalty to the base policy.

    loss = w max(-A r, -A clip(r, 1-c, 1+c)) + beta KL, with r the ratio of mean log-probabilities (Flow-GRPO,
    arXiv 2505.05470). The KL of two Gaussians of equal std is ||mean - base_mean||^2 / (2 std^2) with the *total* std
    of the step, averaged over dimensions like the log-probability; Flow-GRPO's code divides by the squared rate
    instead, so its beta is not ours. The weight w (`step_weight: std`) is std / mean std (TempFlow-GRPO): gradients
    of log-probabilities scale with 1 / std, so without it late steps are an order of magnitude louder.
    """

    kind: Literal["clipped"] = "clipped"
    clip: float = Field(1e-4, gt=0, lt=1, description="c; of a log-probability that is a mean over dimensions")
    beta: float = Field(0.0, ge=0, description="weight of the KL to the base policy, in Gaussian units")
    step_weight: Literal["none", "std"] = Field("none", description="weight of a step's policy loss: 1, or its std")

    @property
    def needs_base(self) -> bool:
        """Only a KL penalty reads the base policy."""
        return self.beta > 0

    def loss(self, update: Update) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss (B,) and the metrics ratio, clipped (share), approx_kl (to the sampling policy), kl (to the base)."""
        difference = update.log_prob - update.old_log_prob
        ratio = difference.exp()
        clipped = ratio.clamp(1 - self.clip, 1 + self.clip)
        gain, bounded = update.advantage * ratio, update.advantage * clipped
        policy = -gain.minimum(bounded)
        if self.step_weight == "std":
            policy = policy * update.std / update.mean_std
        metrics = {
            "ratio": ratio.detach(),
            "clipped": (bounded < gain).float(),
            "approx_kl": difference.detach().square() / 2,
        }
        if update.base_mean is None:
            return policy, metrics
        squared = (update.mean - update.base_mean).square().flatten(1).mean(dim=1)
        kl = squared / (2 * update.std.square())
        return policy + self.beta * kl, metrics | {"kl": kl.detach()}
