"""Stochastic denoising steps: x' = mean + std * noise, with mean = A_x x + A_v v.

Time runs from sigma 1 (noise) to 0 (image); `delta` is sigma - sigma_next > 0, `rate` is noise per square root of
sigma, and the total standard deviation of a step is rate * sqrt(delta). All arithmetic is float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from aegpo.interfaces import Gaussian
from aegpo.specs import Experiment, SamplerSpec

if TYPE_CHECKING:
    from torch import Tensor

NEARLY_ONE = 1.0 - 1e-6


def euler(latents: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """The deterministic step: (B, C, H, W) twice and (B,) twice -> (B, C, H, W)."""
    return latents.float() + _spread(sigma_next - sigma, latents) * velocity.float()


class FlowSde(SamplerSpec):
    """Flow-GRPO's stochastic step with the marginals of the flow (arXiv 2505.05470, Eq. 9 and its code).

    rate = a sqrt(sigma / (1 - sigma)), with sigma_next in the denominator at sigma = 1 as in the published code;
    A_x = 1 - rate^2 delta / (2 sigma);  A_v = -delta (1 + rate^2 (1 - sigma) / (2 sigma)).
    """

    kind: Literal["flow-sde"] = "flow-sde"
    noise_level: float = Field(0.7, ge=0, description="a: 0 is the deterministic step (Flow-GRPO, SD3.5: 0.7)")

    def transition(self, latents: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor) -> Gaussian:
        """(B, C, H, W) twice, (B,) twice -> mean and total std; at noise level 0 exactly the Euler step."""
        delta = sigma - sigma_next
        below_one = sigma_next.where(sigma > NEARLY_ONE, sigma)
        variance_rate = self.noise_level**2 * sigma / (1 - below_one)
        pull = variance_rate / (2 * sigma)
        drift = _spread(pull, latents) * (latents.float() + _spread(1 - sigma, latents) * velocity.float())
        mean = euler(latents, velocity, sigma, sigma_next) - _spread(delta, latents) * drift
        return Gaussian(mean, (variance_rate * delta).sqrt())

    def problems(self, experiment: Experiment) -> Iterator[str]:
        """Training needs noise."""
        if self.noise_level == 0:
            yield "'noise_level' 0 makes every step deterministic: there would be nothing to learn from; Flow-GRPO: 0.7"

    def log_prob(self, gaussian: Gaussian, next_latents: Tensor) -> Tensor:  # (B,)
        """Gaussian log-density, averaged over dimensions (Flow-GRPO's convention)."""
        return gaussian_log_prob(gaussian, next_latents)


def gaussian_log_prob(gaussian: Gaussian, next_latents: Tensor) -> Tensor:  # (B,) float32
    """mean over dimensions of -(x' - mean)^2 / (2 std^2) - log std - log sqrt(2 pi); std must be positive."""
    residual = (next_latents.float() - gaussian.mean).square().flatten(1).mean(dim=1)
    return -residual / (2 * gaussian.std.square()) - gaussian.std.log() - 0.5 * math.log(2 * math.pi)


def _spread(values: Tensor, like: Tensor) -> Tensor:
    """(B,) as (B, 1, 1, 1), to multiply latents with."""
    return values.float().view(-1, *(1 for _ in like.shape[1:]))
