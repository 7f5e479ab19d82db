"""PPO's clipped loss of denoising steps: Flow-GRPO and most of its relatives."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from aegpo.core.experiment import Experiment
from aegpo.core.records import Update
from aegpo.method.objectives.common import ReverseObjective, clip_cautions, ratio_metrics, surrogate

if TYPE_CHECKING:
    from torch import Tensor


class ClippedObjective(ReverseObjective):
    """PPO's clipped surrogate on every transition, with an optional KL penalty to the base policy.

    loss = w max(-A r, -A clip(r, 1-c, 1+c)) + beta KL, with r the ratio of mean log-probabilities (Flow-GRPO,
    arXiv 2505.05470). The KL is that of the two Gaussians; Flow-GRPO's code divides by the squared rate instead
    (`kl_units: rate`), so its beta is not ours. The weight w (`step_weight: std`) is std / mean std (TempFlow-GRPO,
    whose 2.25 is 1 / mean std of its schedule): gradients of log-probabilities scale with 1 / std, so without it late
    steps are an order of magnitude louder.
    """

    kind: Literal["clipped"] = "clipped"
    clip: float = Field(1e-4, gt=0, lt=1, description="c; of a log-probability that is a mean over dimensions")
    step_weight: Literal["none", "std"] = Field("none", description="weight of a step's policy loss: 1, or its std")

    def cautions(self, experiment: Experiment) -> Iterator[str]:
        """Whether the clip range fits the sampler's log-probability."""
        ratio: Literal["gaussian", "unscaled"] = "gaussian" if experiment.sampler.gaussian else "unscaled"
        yield from clip_cautions(self.clip, ratio, experiment)

    def loss(self, update: Update) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss (B,) and the metrics ratio, clipped (share), approx_kl (to the sampling policy), kl (to the base)."""
        difference = update.log_prob - update.old_log_prob
        policy, clipped = surrogate(difference.exp(), update.advantage, self.clip)
        if self.step_weight == "std":
            policy = policy * update.std / update.mean_std
        return self.penalised(policy, ratio_metrics(difference, clipped), update)
