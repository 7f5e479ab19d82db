"""GRPO-Guard: ratios freed of their bias and of the step's noise level."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from aegpo.core.experiment import Experiment
from aegpo.core.records import Update
from aegpo.method.objectives.clipped import (
    ReverseObjective,
    clip_cautions,
    fitting_clip,
    mean_square,
    ratio_metrics,
    surrogate,
)

if TYPE_CHECKING:
    from torch import Tensor


class GuardedObjective(ReverseObjective):
    """The clipped surrogate of GRPO-Guard, whose ratio is centred and scales alike at every step.

    With z the noise of the step and dmu = mean - old_mean, the log-ratio of Gaussians is mean_d[z dmu / std -
    dmu^2 / (2 std^2)]: biased below 0, and louder where std is small. Adding b = mean_d[dmu^2] / (2 std^2) and
    multiplying by the total std leaves log r = mean_d[z dmu]; dividing the loss by delta then makes the gradient
    through the velocity equal at all steps (Flow-GRPO's train_sd3_GRPO_Guard.py). There b is one number for the whole
    batch, as its mean runs over an empty list of dimensions; here every sample has its own.
    """

    kind: Literal["guarded"] = "guarded"
    needs_old: ClassVar[bool] = True
    clip: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="c; of the guarded ratio (GRPO-Guard: 2e-6, PickScore 4e-6). null: 2e-6 at 65536 dimensions, at "
        "the latents' own dimensions as much of the whole log-ratio",
    )

    def problems(self, experiment: Experiment) -> Iterator[str]:
        """The correction is that of Gaussian log-probabilities."""
        if not experiment.sampler.gaussian:
            yield (
                f"the ratio is corrected for Gaussian log-probabilities, but sampler {experiment.sampler.kind!r} "
                "leaves out 1 / (2 std^2); let it use Gaussian ones, or choose objective 'clipped'"
            )

    def cautions(self, experiment: Experiment) -> Iterator[str]:
        """Whether the clip range fits the guarded ratio."""
        yield from clip_cautions(self.clip, "guarded", experiment)

    def loss(self, update: Update) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss (B,) and the metrics ratio (guarded), clipped (share), approx_kl (of that ratio), kl (to the base)."""
        assert update.old_mean is not None, "needs_old"
        bias = mean_square(update.mean - update.old_mean) / (2 * update.std.square())
        log_ratio = (update.log_prob - update.old_log_prob + bias) * update.std
        clip = self.clip or fitting_clip("guarded", update.mean[0].numel())
        policy, clipped = surrogate(log_ratio.exp(), update.advantage, clip)
        return self.penalised(policy / update.delta, ratio_metrics(log_ratio, clipped), update)
