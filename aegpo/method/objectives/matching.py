"""AWM: the policy gradient with the matching loss of the forward process for a log-probability."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from aegpo.core.experiment import Experiment
from aegpo.core.parts import ObjectiveSpec
from aegpo.core.records import Renoised
from aegpo.core.registry import Where
from aegpo.method.objectives.clipped import clip_cautions, fitting_clip, mean_square, ratio_metrics, surrogate

if TYPE_CHECKING:
    from torch import Tensor

SMALL = 1e-10  # keeps roots differentiable at 0


class MatchingObjective(ObjectiveSpec):
    """Advantage-weighted matching: clean samples noised again, likelier where the velocity matches noise - x0.

    log p = -weight(sigma, mean_d (v - (noise - x0))^2), and the ratio to the policy that sampled is taken at the same
    noise and level; PPO's clip applies (AWM, as in Flow-Factory's trainers/awm.py). Both squared distances of
    velocities are without weights. Errors are taken in float64, as there.
    """

    kind: Literal["awm"] = "awm"
    read_where: ClassVar[Mapping[str, Where]] = {"power": Where("weight", ("ghuber",))}
    process: ClassVar[Literal["reverse", "forward"]] = "forward"
    needs_old: ClassVar[bool] = True
    clip: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="c of PPO's clip. null: Flow-Factory's 1e-5 at 65536 dimensions, at the latents' own dimensions as "
        "much of the whole log-ratio",
    )
    weight: Literal["1", "t", "t2", "huber", "ghuber"] = Field(
        "1",
        description="of a squared error m at noise level t: m; m t; m t^2; t (sqrt(m + e) - sqrt(e)); or "
        "t ((m + e)^p - e^p) / p, with e = 1e-10",
    )
    power: float = Field(0.25, gt=0, le=1, description="p of weight 'ghuber' (Flow-Factory: 0.25)")
    velocity_penalty: float = Field(
        0.0,
        ge=0,
        le=1e6,
        description="weight of the squared distance to the base policy's velocity (Flow-Factory: optional)",
    )
    old_penalty: float = Field(
        0.0,
        ge=0,
        le=1e6,
        description="weight of the squared distance to the sampling policy's velocity (Flow-Factory: to an EMA)",
    )

    def cautions(self, experiment: Experiment) -> Iterator[str]:
        """Whether the clip range fits the ratio of matching losses."""
        yield from clip_cautions(self.clip, "matching", experiment)

    @property
    def needs_base(self) -> bool:
        """Only the penalty reads the base policy."""
        return self.velocity_penalty > 0

    def log_prob(self, velocity: Tensor, target: Tensor, sigma: Tensor) -> Tensor:  # (B,) float64
        """Minus the weighted error of (B, *x) velocities against the flow's own target."""
        error = mean_square(velocity.double() - target)
        if self.weight == "1":
            return -error
        if self.weight == "t":
            return -error * sigma
        if self.weight == "t2":
            return -error * sigma.square()
        power = 0.5 if self.weight == "huber" else self.power
        root: Tensor = (error + SMALL).pow(power) - SMALL**power
        return -root * sigma / (1 if self.weight == "huber" else power)

    def loss(self, update: Renoised) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss (B,) and the metrics ratio, clipped (share), approx_kl and, where penalised, velocity_kl and old_kl."""
        assert update.old_velocity is not None, "needs_old"
        sigma = update.sigma.double()
        wide = sigma.view(-1, *(1 for _ in update.clean.shape[1:]))
        target = (update.latents.double() - update.clean.double()) / wide
        difference = self.log_prob(update.velocity, target, sigma) - self.log_prob(update.old_velocity, target, sigma)
        clip = self.clip or fitting_clip("matching", update.velocity[0].numel())
        loss, clipped = surrogate(difference.exp(), update.advantage.double(), clip)
        metrics = ratio_metrics(difference, clipped)
        if update.base_velocity is not None:
            distance = mean_square(update.velocity - update.base_velocity)
            loss, metrics["velocity_kl"] = loss + self.velocity_penalty * distance, distance.detach()
        if self.old_penalty > 0:
            distance = mean_square(update.velocity - update.old_velocity)
            loss, metrics["old_kl"] = loss + self.old_penalty * distance, distance.detach()
        return loss.float(), metrics
