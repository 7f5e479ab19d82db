"""Stochastic denoising steps: x' = A_x x + A_v v + std * noise.

Time runs from sigma 1 (noise) to 0 (image); `delta` is sigma - sigma_next > 0, `rate` is noise per square root of
sigma, and `std` is the total standard deviation of a step. Every sampler says its three coefficients once, for arrays
as for tensors; latents are mixed in float32. A `scale` multiplies the rate of some steps: drift and noise follow
together, so that the marginals are kept as before.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal, TypeVar

import numpy as np
from pydantic import Field

from aegpo.core.experiment import Experiment
from aegpo.core.parts import SamplerSpec
from aegpo.core.records import FloatArray, Gaussian, StepTable
from aegpo.errors import ContractError

if TYPE_CHECKING:
    from torch import Tensor

V = TypeVar("V", "FloatArray", "Tensor")
NEARLY_ONE = 1.0 - 1e-6
LEAST_NOISE = 1e-4


def euler(latents: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """The deterministic step: (B, *x) twice and (B,) twice -> (B, *x)."""
    return latents.float() + _spread(sigma_next - sigma, latents) * velocity.float()


def start_latents(noise: Tensor, sigmas: Tensor) -> Tensor:
    """What pure noise (B, *x) stands for at the first level, as in the published pipelines.

    Those of variance-preserving models (DDIM of SD 1.x and SDXL) begin below sigma 1 and take noise for the state
    x = a x0 + s noise there, which has its variance; in flow coordinates that is x / (a + s), with
    1 / (a + s) = sqrt(sigma^2 + (1 - sigma)^2). At sigma 1 it is the noise itself.
    """
    return noise * _state_share(sigmas[0])


def final_latents(latents: Tensor, sigmas: Tensor) -> Tensor:
    """What stands for the image when the last level is reached: the state x there. At sigma 0 nothing changes."""
    return latents.float() / _state_share(sigmas[-1])


def _state_share(sigma: Tensor) -> Tensor:
    return (sigma.square() + (1 - sigma).square()).sqrt()


def gaussian_log_prob(gaussian: Gaussian, next_latents: Tensor) -> Tensor:  # (B,) float32
    """mean over dimensions of -(x' - mean)^2 / (2 std^2) - log std - log sqrt(2 pi); std must be positive."""
    residual = squared_distance(gaussian, next_latents)
    return -residual / (2 * gaussian.std.square()) - gaussian.std.log() - 0.5 * math.log(2 * math.pi)


def squared_distance(gaussian: Gaussian, next_latents: Tensor) -> Tensor:  # (B,) float32
    """mean over dimensions of (x' - mean)^2."""
    return (next_latents.float() - gaussian.mean).square().flatten(1).mean(dim=1)


def marginal_kept(sigma: V, sigma_next: V, variance_rate: V) -> tuple[V, V, V]:
    """Coefficients (A_x, A_v, std) of the SDE with the marginals of the flow and noise of rate^2 per unit of sigma.

    A_x = 1 - rate^2 delta / (2 sigma);  A_v = -delta (1 + rate^2 (1 - sigma) / (2 sigma));  std = rate sqrt(delta)
    (Flow-GRPO, arXiv 2505.05470, Eq. 9; DanceGRPO writes the same through the score).
    """
    delta = sigma - sigma_next
    pull = variance_rate / (2 * sigma)
    return 1 - pull * delta, -delta - pull * (1 - sigma) * delta, (variance_rate * delta) ** 0.5


class _AffineSampler(SamplerSpec):
    """What every sampler in the box shares: a step is its three coefficients."""

    std_only: bool = Field(
        False,
        description="what a plan that scales noise multiplies: the noise rate, so that the drift follows, or only the "
        "std, after the drift (BranchGRPO's code)",
    )

    def coefficients(self, sigma: V, sigma_next: V, scale: V | None = None) -> tuple[V, V, V]:
        """(B,) twice, (B,) of the noise rate or None -> A_x, A_v and std, (B,) each."""
        raise NotImplementedError(f"sampler {self.kind!r} does not define coefficients(sigma, sigma_next, scale)")

    @property
    def most_scale(self) -> tuple[float, str]:
        """The largest factor that its noise rate can have, and the setting that says so."""
        return math.inf, ""

    def scaled(self, sigma: V, sigma_next: V, scale: V | None) -> tuple[V, V, V]:
        """The coefficients of steps, of which some have more or less noise than others.

        With `std_only` the step is A_x x + A_v v + scale std noise, with A_x and A_v of a scale of 1. Then the drift no
        longer takes out what the noise adds: the variance of the next state is (scale^2 - 1) std^2 above the flow's,
        and what later steps do not take out again stays in the image (`residual_noise`). BranchGRPO draws the children
        of a split so, four times as wide. Deviation: its log-probability is that of the std before the factor, so that
        its gradient is scale^2 times the likelihood's; here it is that of the noise that was added.
        """
        if scale is None or not self.std_only:
            return self.coefficients(sigma, sigma_next, scale)
        by_latents, by_velocity, std = self.coefficients(sigma, sigma_next)
        return by_latents, by_velocity, std * scale

    def table_between(self, sigma: FloatArray, sigma_next: FloatArray, scale: FloatArray | None = None) -> StepTable:
        """(K,) noise levels twice, (K,) of the noise rate or None -> the coefficients of K steps.

        Raises:
            ContractError: if a scale asks for more noise than there is.
        """
        most, why = self.most_scale
        if scale is not None and not self.std_only and (largest := float(scale.max())) > most:
            raise ContractError(
                f"sampler {self.kind!r} can have at most {most:.4g} times its noise, not {largest:g} times: {why}; "
                "lower it, scale less, or set 'std_only: true'"
            )
        return StepTable(*self.scaled(sigma, sigma_next, scale))

    def transition(
        self, latents: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor, scale: Tensor | None = None
    ) -> Gaussian:
        """(B, *x) twice, (B,) twice, (B,) of the noise rate or None -> mean and total std."""
        factor = None if scale is None else scale.float()
        by_latents, by_velocity, std = self.scaled(sigma.float(), sigma_next.float(), factor)
        mean = _spread(by_latents, latents) * latents.float() + _spread(by_velocity, latents) * velocity.float()
        return Gaussian(mean, std)

    def log_prob(self, gaussian: Gaussian, next_latents: Tensor) -> Tensor:  # (B,)
        """Gaussian log-density, averaged over dimensions (the convention of all but CPS)."""
        return gaussian_log_prob(gaussian, next_latents)


class FlowSde(_AffineSampler):
    """Flow-GRPO's stochastic step with the marginals of the flow (arXiv 2505.05470, Eq. 9 and its code).

    rate = a sqrt(sigma / (1 - sigma)), with sigma_next in the denominator at sigma = 1 as in the published code, so
    that the std of the first step is a. Noise shrinks towards the image, but a long step overshoots the noise level it
    arrives at: see `residual_noise` among the metrics, and end with deterministic steps.
    """

    kind: Literal["flow-sde"] = "flow-sde"
    noise_level: float = Field(0.7, ge=0, le=10, description="a: 0 is the deterministic step (Flow-GRPO, SD3.5: 0.7)")

    def coefficients(self, sigma: V, sigma_next: V, scale: V | None = None) -> tuple[V, V, V]:
        """(B,) twice, (B,) or None -> A_x, A_v and std, (B,) each; at noise level 0 exactly the Euler step's."""
        first = sigma > NEARLY_ONE  # rounding may leave sigma_0 a little above or below 1
        below_one = sigma_next * first + sigma * ~first
        return marginal_kept(sigma, sigma_next, _faster(self.noise_level**2 * sigma / (1 - below_one), scale))

    def problems(self, experiment: Experiment) -> Iterator[str]:
        """Learning from denoising steps needs noise."""
        yield from too_quiet("noise_level", self.noise_level, "Flow-GRPO: 0.7", experiment)


class DanceSde(_AffineSampler):
    """DanceGRPO's stochastic step: noise of a constant rate, with the marginals of the flow (its FLUX code).

    It is `flow-sde` with rate = eta at every noise level, so its noise grows relative to what is left of it: the last
    step's stays in the image unless the run ends with `decode: predicted-clean`, as DanceGRPO and BranchGRPO do.
    """

    kind: Literal["dance-sde"] = "dance-sde"
    eta: float = Field(
        0.3, ge=0, le=10, description="noise per square root of sigma (DanceGRPO, FLUX: 0.3; Hunyuan: 0.25)"
    )

    def coefficients(self, sigma: V, sigma_next: V, scale: V | None = None) -> tuple[V, V, V]:
        """(B,) twice, (B,) or None -> A_x, A_v and std, (B,) each."""
        return marginal_kept(sigma, sigma_next, _faster(0 * sigma + self.eta**2, scale))

    def problems(self, experiment: Experiment) -> Iterator[str]:
        """Learning from denoising steps needs noise."""
        yield from too_quiet("eta", self.eta, "DanceGRPO: 0.3", experiment)


class CpsSampler(_AffineSampler):
    """Flow-CPS: the step keeps the noise level of the schedule exactly (coefficient-preserving sampling).

    With x0 = x - sigma v and noise = x + (1 - sigma) v:  std = sigma' sin(a pi / 2);
    mean = (1 - sigma') x0 + sigma' cos(a pi / 2) noise (Flow-GRPO's code, `sde_type: cps`). A scale multiplies a, up to
    a quarter turn. The last step has no noise and cannot be trained. The published log-probability lacks 1 / (2 std^2):
    its differences are about 2 std^2 times the Gaussian's, so clip ranges do not carry over from one convention to the
    other.
    """

    kind: Literal["cps"] = "cps"
    noise_level: float = Field(0.8, ge=0, le=1, description="a: 0 is the deterministic step (Flow-GRPO: 0.8)")
    convention: Literal["unscaled", "gaussian"] = Field(
        "unscaled",
        description="log-probability: -(x' - mean)^2 as published (Flow-GRPO's clip for it: 1e-5), or the Gaussian's",
    )

    @property
    def gaussian(self) -> bool:
        """False for the published convention."""
        return self.convention == "gaussian"

    @property
    def most_scale(self) -> tuple[float, str]:
        """At a quarter turn all noise is new."""
        most = 1 / self.noise_level if self.noise_level else math.inf
        return most, f"'noise_level' is {self.noise_level:g}, and at 1 all the noise of a step is new"

    def coefficients(self, sigma: V, sigma_next: V, scale: V | None = None) -> tuple[V, V, V]:
        """(B,) twice, (B,) or None -> A_x, A_v and std, (B,) each."""
        angle = self.noise_level * math.pi / 2
        if scale is None:
            return coefficient_preserving(sigma, sigma_next, sigma_next * math.cos(angle), sigma_next * math.sin(angle))
        kept, new = _cosine(scale * angle), _cosine(math.pi / 2 - scale * angle)
        return coefficient_preserving(sigma, sigma_next, sigma_next * kept, sigma_next * new)

    def log_prob(self, gaussian: Gaussian, next_latents: Tensor) -> Tensor:  # (B,)
        """Mean over dimensions of -(x' - mean)^2, or the Gaussian log-density."""
        if self.gaussian:
            return gaussian_log_prob(gaussian, next_latents)
        return -squared_distance(gaussian, next_latents)

    def problems(self, experiment: Experiment) -> Iterator[str]:
        """Learning from denoising steps needs noise."""
        yield from too_quiet("noise_level", self.noise_level, "Flow-GRPO: 0.8", experiment)


class DdimSampler(_AffineSampler):
    """DDIM with eta, as DDPO samples (Song et al. 2021, Eq. 12 and 16), in flow coordinates.

    With a = sqrt(abar), s = sqrt(1 - abar) and c = a + s, the flow's x is x / c and its sigma is s / c. Dividing DDIM's
    step by c' makes it a coefficient-preserving one:  mean = (1 - sigma') x0 + sqrt(sigma'^2 - std^2) noise  with
    std = eta sigma' sqrt(1 - ((1 - sigma) sigma' / (sigma (1 - sigma')))^2). A log-probability is DDPO's plus log c'
    (per dimension, a constant of the level, so ratios are DDPO's).

    DDPO trains all its steps. Its last one ends at abar of the first timestep, where a little noise is left; so do the
    schedules of SD 1.x pipelines. Where a schedule ends at sigma 0 the last std is 0 and that step cannot be trained.
    """

    kind: Literal["ddim"] = "ddim"
    eta: float = Field(1.0, ge=0, le=1, description="0 is the deterministic step, 1 is ancestral sampling (DDPO: 1)")

    @property
    def most_scale(self) -> tuple[float, str]:
        """Ancestral sampling has all the noise there is."""
        most = 1 / self.eta if self.eta else math.inf
        return most, f"'eta' is {self.eta:g}, and 1 is ancestral sampling, which has the most"

    def coefficients(self, sigma: V, sigma_next: V, scale: V | None = None) -> tuple[V, V, V]:
        """(B,) twice, (B,) or None -> A_x, A_v and std, (B,) each; with eta 0 the Euler step's."""
        odds = (1 - sigma) * sigma_next / (sigma * (1 - sigma_next))
        left = 1 - odds**2  # the share of the noise's variance that is new
        if scale is None:
            std = self.eta * sigma_next * left**0.5
            return coefficient_preserving(sigma, sigma_next, sigma_next * (1 - self.eta**2 * left) ** 0.5, std)
        new = (self.eta * scale) ** 2 * left
        kept = abs(1 - new) ** 0.5  # at the largest scale, rounding may leave `new` a little above 1
        return coefficient_preserving(sigma, sigma_next, sigma_next * kept, sigma_next * new**0.5)

    def problems(self, experiment: Experiment) -> Iterator[str]:
        """Learning from denoising steps needs noise."""
        yield from too_quiet("eta", self.eta, "DDPO: 1", experiment)


def too_quiet(field: str, noise: float, published: str, experiment: Experiment) -> Iterator[str]:
    """Whether denoising steps have too little noise to learn from them; in the forward process they need none."""
    if noise >= LEAST_NOISE or experiment.objective.process != "reverse":
        return
    if noise == 0:
        yield f"'{field}' 0 makes every step deterministic: there would be nothing to learn from; {published}"
    else:
        yield (
            f"'{field}' {noise:g} is less noise than log-probabilities in float32 can be told apart by; at least "
            f"{LEAST_NOISE:g}, and 0 for an objective of the forward process; {published}"
        )


def coefficient_preserving(sigma: V, sigma_next: V, kept: V, std: V) -> tuple[V, V, V]:
    """Coefficients of mean = (1 - sigma') x0 + kept noise, where kept^2 + std^2 = sigma'^2."""
    return (1 - sigma_next) + kept, (1 - sigma) * kept - sigma * (1 - sigma_next), std


def _faster(variance_rate: V, scale: V | None) -> V:
    """Noise of `scale` times the rate."""
    return variance_rate if scale is None else variance_rate * scale**2


def _cosine(angle: V) -> V:
    return np.cos(angle) if isinstance(angle, np.ndarray) else angle.cos()


def _spread(values: Tensor, like: Tensor) -> Tensor:
    """(B,) as (B, 1, ...), of the latents' rank, to multiply them with."""
    return values.float().view(-1, *(1 for _ in like.shape[1:]))
