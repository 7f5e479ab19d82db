"""DiffusionNFT: reinforcement learning in the forward process, by two implicit policies."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from aegpo.core.parts import ObjectiveSpec
from aegpo.core.records import Renoised
from aegpo.method.objectives.clipped import mean_square, ratio_metrics

if TYPE_CHECKING:
    from torch import Tensor

LEAST_WEIGHT = 1e-5  # least mean distance to the clean latents that a loss is divided by


class NftObjective(ObjectiveSpec):
    """Negative-aware fine-tuning of clean samples (DiffusionNFT): towards the good ones, away from the bad ones.

    With b the mixing, v_old the velocity of the policy that sampled and x_sigma = (1 - sigma) x0 + sigma noise:

        v+ = b v + (1 - b) v_old        v- = (1 + b) v_old - b v        x0+- = x_sigma - sigma v+-
        r = clamp(clamp(A, +-limit) / limit / 2 + 1/2, 0, 1)
        loss = limit [ r mean_d (x0+ - x0)^2 / w+ + (1 - r) mean_d (x0- - x0)^2 / w- ] / b
             + velocity_penalty mean_d (v - v_base)^2,      w+- = max(mean_d |x0+- - x0|, 1e-5), without a gradient

    The published configuration has two settings called beta: `config.beta` is `mixing` here, `config.train.beta` is
    `velocity_penalty`. `advantage.clip` should not be below `limit`. Distances are taken in float64, as there.
    """

    kind: Literal["nft"] = "nft"
    process: ClassVar[Literal["reverse", "forward"]] = "forward"
    needs_old: ClassVar[bool] = True
    keeps_old: ClassVar[bool] = True
    mixing: float = Field(
        1.0,
        ge=1e-3,
        le=1000,
        description="b, how far the implicit policies are from the old one (config.beta: 1; OCR 0.1)",
    )
    velocity_penalty: float = Field(
        1e-4,
        ge=0,
        le=1e6,
        description="weight of the squared distance to the base policy's velocity (config.train.beta: 1e-4)",
    )
    limit: float = Field(
        5.0, ge=1e-3, le=1e6, description="advantages beyond +- this count as wholly good or bad (all: 5)"
    )
    credit: Literal["all", "positive", "negative", "binary"] = Field(
        "all", description="which advantages count: all, those above 0, those below 0, or only their sign"
    )
    old_schedule: Literal["current", "ramp", "late"] = Field(
        "ramp",
        description="what the sampling policy keeps of itself after training step k: nothing; min(k / 1000, 1/2); or "
        "nothing until step 75, then min(0.0075 (k - 75), 0.999) (the published types 0, 1 and 2)",
    )

    @property
    def needs_base(self) -> bool:
        """Only the penalty reads the base policy."""
        return self.velocity_penalty > 0

    def old_decay(self, step: int) -> float:
        """In [0, 1]: what the sampling policy keeps of itself after a training step."""
        if self.old_schedule == "current":
            return 0.0
        if self.old_schedule == "ramp":
            return min(0.001 * step, 0.5)
        return min(max(0.0075 * (step - 75), 0.0), 0.999)

    def goodness(self, advantage: Tensor) -> Tensor:  # (B,) in [0, 1]
        """r: how much of the loss is the good policy's."""
        if self.credit == "positive":
            advantage = advantage.clamp(min=0)
        elif self.credit == "negative":
            advantage = advantage.clamp(max=0)
        elif self.credit == "binary":
            advantage = advantage.sign()
        return (advantage.clamp(-self.limit, self.limit) / self.limit / 2 + 0.5).clamp(0, 1)

    def loss(self, update: Renoised) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss (B,) and the metrics ratio, clipped (share at r = 0 or 1), approx_kl, goodness and velocity_kl.

        The ratio is that of AWM, exp(squared error of the old velocity - that of the current one).
        """
        assert update.old_velocity is not None, "needs_old"
        velocity, old, b = update.velocity.double(), update.old_velocity.double(), self.mixing
        sigma = update.sigma.double().view(-1, *(1 for _ in velocity.shape[1:]))
        latents, clean = update.latents.double(), update.clean.double()
        good = self.goodness(update.advantage).double()

        def distance(mixed: Tensor) -> Tensor:  # (B,)
            off = latents - sigma * mixed - clean
            return mean_square(off) / off.detach().abs().flatten(1).mean(dim=1).clamp(min=LEAST_WEIGHT)

        towards, away = distance(b * velocity + (1 - b) * old), distance((1 + b) * old - b * velocity)
        loss = self.limit * (good * towards + (1 - good) * away) / b
        target = (latents - clean) / sigma
        log_ratio = mean_square(old - target) - mean_square(velocity - target)
        metrics = ratio_metrics(log_ratio, ((good == 0) | (good == 1)).float()) | {"goodness": good}
        if update.base_velocity is not None:
            penalty = mean_square(velocity - update.base_velocity.double())
            loss, metrics["velocity_kl"] = loss + self.velocity_penalty * penalty, penalty.detach()
        return loss.float(), metrics
