"""DGPO: the good rollouts of a prompt are preferred to its bad ones, as two groups."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from aegpo.core.experiment import Experiment
from aegpo.core.parts import ObjectiveSpec
from aegpo.core.records import Renoised
from aegpo.method.objectives.clipped import clip_cautions, fitting_clip, mean_square, ratio_metrics

if TYPE_CHECKING:
    from torch import Tensor


class PreferenceObjective(ObjectiveSpec):
    """Direct group preference optimisation (DGPO, arXiv 2510.08425): a group's good rollouts are to beat its bad ones.

    With d, d_base and d_old the mean squared distances of the current, the base and the sampling policy's velocity to
    noise - x0, A the advantages, b the sharpness and s the score of a group G, a prompt's rollouts at one noise level:

        s = b / |G| sum_G A (d - d_base)        loss of each of its rows = -log sigmoid(-s) / b

    That is Eq. 17 with weights |A| over G+ (A > 0) and G- (the others), of velocities and with lambda_t = 1, as in its
    code (scripts/train_sd3_dgpo.py), whose loss sigmoid(s) A d has the same gradient: hence the division by b. One
    level and, by default, one noise serve the whole group. Rows whose ratio exp(d_old - d) has left 1 +- clip the way
    A asks for keep their distance but lose its gradient. Distances are taken in float64.

    Advantages should sum to 0 in a group, so that the partition function cancels (Sec. 3.2); those of `group` do until
    they are cut off. The sampling policy lags from the first training step on (there: from optimizer step 200).
    Published runs learn from 4 of the noisier levels (the timestep clip): choose them by the selector. Rollouts may be
    deterministic. Each edge costs 1 evaluation of the base and 1 of the sampling policy more, as with `nft`.
    """

    kind: Literal["dgpo"] = "dgpo"
    process: ClassVar[Literal["reverse", "forward"]] = "forward"
    scope: ClassVar[Literal["rows", "groups"]] = "groups"
    needs_old: ClassVar[bool] = True
    keeps_old: ClassVar[bool] = True
    sharpness: float = Field(
        100.0,
        ge=1e-3,
        le=1e6,
        description="b, of mean squared distances; larger: groups that are told apart well count less (Appendix E: "
        "100; its README: 10 to 100)",
    )
    clip: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="c of the ratio (config/dgpo.py: 1e-2; its README: 1e-3 is more stable). null: 1e-2 at 65536 "
        "dimensions, at the latents' own dimensions as much of the whole log-ratio",
    )
    velocity_penalty: float = Field(
        0.02,
        ge=0,
        le=1e6,
        description="weight of the squared distance to the base policy's velocity (config/dgpo.py, config.train.beta: "
        "0.02; its README: 1e-3)",
    )
    noise: Literal["own", "group"] = Field(
        "group",
        description="what a rollout is noised again with: noise of its own, or one for all rollouts of its prompt at "
        "the level (Sec. 3.2: group, for its lower variance)",
    )
    old_schedule: Literal["current", "ramp"] = Field(
        "ramp",
        description="what the sampling policy keeps of itself after training step k: nothing, or min(k / 1000, 0.3) "
        "(scripts/train_sd3_dgpo.py, by optimizer steps)",
    )

    @property
    def needs_base(self) -> bool:
        """The preference is measured against the base policy."""
        return True

    @property
    def shares_noise(self) -> bool:
        """True if all rollouts of a prompt get the same noise at a level."""
        return self.noise == "group"

    def old_decay(self, step: int) -> float:
        """In [0, 1]: what the sampling policy keeps of itself after a training step."""
        return 0.0 if self.old_schedule == "current" else min(0.001 * step, 0.3)

    def cautions(self, experiment: Experiment) -> Iterator[str]:
        """Whether the clip range fits the ratio of squared distances."""
        yield from clip_cautions(self.clip, "preference", experiment)

    def loss(self, update: Renoised) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss (B,), equal in a group but for the penalty, and the metrics.

        They are ratio, clipped (share), approx_kl, velocity_kl, and preference: the likelihood sigmoid(-s) of the order
        of a row's group, in [0, 1], 1/2 under the base policy and higher is better.
        """
        import torch
        from torch.nn.functional import softplus

        assert update.old_velocity is not None, "needs_old"
        assert update.base_velocity is not None, "needs_base"
        velocity, base = update.velocity.double(), update.base_velocity.double()
        clean, advantage = update.clean.double(), update.advantage.double()
        sigma = update.sigma.double().view(-1, *(1 for _ in clean.shape[1:]))
        target = (update.latents.double() - clean) / sigma
        error, base_error = mean_square(velocity - target), mean_square(base - target)
        log_ratio = (mean_square(update.old_velocity.double() - target) - error).detach()
        clip, ratio = self.clip or fitting_clip("preference", clean[0].numel()), log_ratio.exp()
        clipped = torch.where(advantage > 0, ratio > 1 + clip, ratio < 1 - clip)
        gain = advantage * (torch.where(clipped, error.detach(), error) - base_error)
        mates = update.group == update.group[:, None]  # (B, B)
        score = self.sharpness * (mates * gain).sum(dim=1) / mates.sum(dim=1)
        distance = mean_square(velocity - base)
        loss = softplus(score) / self.sharpness + self.velocity_penalty * distance
        metrics = ratio_metrics(log_ratio, clipped.double())
        metrics |= {"velocity_kl": distance.detach(), "preference": score.detach().neg().sigmoid()}
        return loss.float(), metrics
