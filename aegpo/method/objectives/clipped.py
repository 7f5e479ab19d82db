"""PPO's clipped loss of denoising steps, as in Flow-GRPO and its relatives, and what other losses share with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from aegpo.core.experiment import Experiment
from aegpo.core.parts import ObjectiveSpec
from aegpo.core.records import Update
from aegpo.core.registry import Where

if TYPE_CHECKING:
    from torch import Tensor


ORDER = 10.0  # a clip range this factor off is called wrong
USUAL_DIMENSIONS = 65536  # of the latents the published clip ranges are for: SD3.5 at 512 x 512
PUBLISHED = {  # ratio -> the clip range it is used with there, and where
    "gaussian": (1e-4, "Flow-GRPO"),
    "unscaled": (1e-5, "Flow-GRPO-Fast with CPS"),
    "guarded": (2e-6, "GRPO-Guard"),
    "matching": (1e-5, "Flow-Factory's AWM"),
    "preference": (1e-2, "DGPO"),
}


def mean_square(values: Tensor) -> Tensor:  # (B, ...) -> (B,)
    """The mean square over all dimensions but the batch's."""
    return values.square().flatten(1).mean(dim=1)


Ratio = Literal["gaussian", "unscaled", "guarded", "matching", "preference"]  # what a clip range bounds


def fitting_clip(ratio: Ratio, dimensions: int) -> float:
    """The published clip range, for latents of so many dimensions.

    Log-probabilities are means over the latent's d dimensions, so a clip range c bounds the whole log-ratio by c d, and
    that is what carries over from one resolution to another.
    """
    published, _ = PUBLISHED[ratio]
    return published * USUAL_DIMENSIONS / dimensions


def surrogate(ratio: Tensor, advantage: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """PPO's loss max(-A r, -A clip(r, 1-c, 1+c)) (B,), and which rows have no gradient because of the clip (B,)."""
    gain, bounded = advantage * ratio, advantage * ratio.clamp(1 - clip, 1 + clip)
    return -gain.minimum(bounded), (bounded < gain).float()


def ratio_metrics(log_ratio: Tensor, clipped: Tensor) -> dict[str, Tensor]:
    """What every objective reports: ratio, clipped (share) and approx_kl = log-ratio^2 / 2, to the sampling policy."""
    log_ratio = log_ratio.detach()
    return {"ratio": log_ratio.exp(), "clipped": clipped, "approx_kl": log_ratio.square() / 2}


class ReverseObjective(ObjectiveSpec):
    """What losses of denoising steps share: an optional KL penalty to the base policy.

    The KL of two Gaussians of equal std is ||mean - base_mean||^2 / (2 std^2) with the *total* std of the step,
    averaged over dimensions like the log-probability.
    """

    read_where: ClassVar[Mapping[str, Where]] = {"kl_units": Where("beta", (0.0,), other=True)}
    beta: float = Field(
        0.0, ge=0, le=1e6, description="weight of the KL to the base policy, in the units of 'kl_units'"
    )
    kl_units: Literal["gaussian", "rate"] = Field(
        "gaussian",
        description="gaussian: divided by 2 std^2; rate: by 2 rate^2, which lacks the step's length (Flow-GRPO's code, "
        "whose beta of 0.04 is meant for it)",
    )

    @property
    def needs_base(self) -> bool:
        """Only a KL penalty reads the base policy."""
        return self.beta > 0

    def penalised(self, policy: Tensor, metrics: dict[str, Tensor], update: Update) -> tuple[Tensor, dict[str, Tensor]]:
        """The policy loss (B,) with the KL penalty, and the metrics with the KL, which is Gaussian in either unit."""
        if update.base_mean is None:
            return policy, metrics
        kl = mean_square(update.mean - update.base_mean) / (2 * update.std.square())
        penalty = kl * update.delta if self.kl_units == "rate" else kl  # rate^2 = std^2 / delta
        return policy + self.beta * penalty, metrics | {"kl": kl.detach()}


def clip_cautions(clip: float | None, ratio: Ratio, experiment: Experiment) -> Iterator[str]:
    """Whether a clip range is an order of magnitude off for what the ratio is made of, and why."""
    known = experiment.model.dimensions
    dimensions = known or USUAL_DIMENSIONS
    published, source = PUBLISHED[ratio]
    fitting = fitting_clip(ratio, dimensions)
    if clip is None or fitting / ORDER <= clip <= fitting * ORDER:
        return
    reasons = {
        "gaussian": "a Gaussian log-probability, averaged over dimensions",
        "unscaled": "a log-probability without the factor 1 / (2 std^2), so that ratios are far nearer to 1",
        "guarded": "a log-ratio freed of its bias and multiplied by the step's std, so that it is far nearer to 0",
        "matching": "the squared errors of two velocities, without a factor 1 / (2 std^2)",
        "preference": "the squared errors of two velocities, without a factor 1 / (2 std^2)",
    }
    size = f"{dimensions} dimensions" if known else f"{dimensions} dimensions, if the latents have as many as there"
    side = "below" if clip < fitting else "above"
    yield (
        f"'clip' {clip:g} is more than {ORDER:g} times {side} what fits here: the ratio "
        f"comes from {reasons[ratio]}; {source} uses {published:g} at {USUAL_DIMENSIONS} dimensions, which is "
        f"{fitting:.1g} at {size}"
    )


class ClippedObjective(ReverseObjective):
    """PPO's clipped surrogate on every transition, with an optional KL penalty to the base policy.

    loss = w max(-A r, -A clip(r, 1-c, 1+c)) + beta KL, with r the ratio of mean log-probabilities (Flow-GRPO,
    arXiv 2505.05470). The KL is that of the two Gaussians; Flow-GRPO's code divides by the squared rate instead
    (`kl_units: rate`), so its beta is not ours. The weight w (`step_weight: std`) is std / mean std (TempFlow-GRPO,
    whose 2.25 is 1 / mean std of its schedule): gradients of log-probabilities scale with 1 / std, so without it late
    steps are an order of magnitude louder.
    """

    kind: Literal["clipped"] = "clipped"
    clip: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="c; of a log-probability that is a mean over dimensions. null: Flow-GRPO's 1e-4 at 65536 "
        "dimensions, so 6.6 nats of the whole log-ratio, at the latents' own dimensions",
    )
    step_weight: Literal["none", "std"] = Field("none", description="weight of a step's policy loss: 1, or its std")

    def problems(self, experiment: Experiment) -> Iterator[str]:
        """The default clip range is that of Gaussian log-probabilities."""
        if self.clip is None and not experiment.sampler.gaussian:
            dimensions = experiment.model.dimensions or USUAL_DIMENSIONS
            yield (
                f"'clip' has no default for sampler {experiment.sampler.kind!r}, whose log-probability is no Gaussian "
                f"one; {PUBLISHED['unscaled'][1]} uses {PUBLISHED['unscaled'][0]:g} at {USUAL_DIMENSIONS} dimensions, "
                f"which is {fitting_clip('unscaled', dimensions):.1g} at {dimensions}"
            )

    def cautions(self, experiment: Experiment) -> Iterator[str]:
        """Whether the clip range fits the sampler's log-probability."""
        ratio: Ratio = "gaussian" if experiment.sampler.gaussian else "unscaled"
        yield from clip_cautions(self.clip, ratio, experiment)

    def loss(self, update: Update) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss (B,) and the metrics ratio, clipped (share), approx_kl (to the sampling policy), kl (to the base)."""
        difference = update.log_prob - update.old_log_prob
        clip = self.clip or fitting_clip("gaussian", update.mean[0].numel())
        policy, clipped = surrogate(difference.exp(), update.advantage, clip)
        if self.step_weight == "std":
            policy = policy * update.std / update.mean_std
        return self.penalised(policy, ratio_metrics(difference, clipped), update)
