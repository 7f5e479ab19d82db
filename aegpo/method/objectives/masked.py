"""Flow-DPPO: transitions are left out by their divergence, not clipped by their ratio."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from aegpo.core.records import Update
from aegpo.method.objectives.clipped import ReverseObjective, mean_square, ratio_metrics

if TYPE_CHECKING:
    from torch import Tensor


class DivergenceMaskedObjective(ReverseObjective):
    """The policy gradient of transitions whose distribution has not moved too far in the credited direction.

    loss = -A r, but 0 where kl >= threshold and the ratio has already moved the way the advantage asks for: r > 1 with
    A > 0, or r < 1 with A < 0. kl is that of the step's Gaussians, mean_d[(mean - old_mean)^2] / (2 std^2): it is
    exact, where a ratio depends on the noise that was drawn (Flow-DPPO, as in verl-omni).
    """

    kind: Literal["divergence-masked"] = "divergence-masked"
    needs_old: ClassVar[bool] = True
    threshold: float = Field(
        1e-5, gt=0, le=1e6, description="KL to the sampling policy from which on a transition may be masked"
    )

    def loss(self, update: Update) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss (B,) and the metrics ratio, clipped (share masked), approx_kl (exact here), kl (to the base)."""
        assert update.old_mean is not None, "needs_old"
        difference = update.log_prob - update.old_log_prob
        ratio = difference.exp()
        divergence = (mean_square(update.mean - update.old_mean) / (2 * update.std.square())).detach()
        onwards = ((ratio > 1) & (update.advantage > 0)) | ((ratio < 1) & (update.advantage < 0))
        masked = (divergence >= self.threshold) & onwards
        metrics = ratio_metrics(difference, masked.float()) | {"approx_kl": divergence}
        return self.penalised(-update.advantage * ratio * ~masked, metrics, update)
