"""The denoising steps of some nodes of a plan: from their states and velocities to those of their children."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from aegpo.core.records import RolloutPlan
from aegpo.method.samplers import euler
from aegpo.method.tails import second_order
from aegpo.train.asking import Answers, log_prob, transition
from aegpo.train.execution import Execution
from aegpo.train.places import Places


@dataclass(frozen=True)
class Steps:
    """The steps to some nodes of one level."""

    sigma: Tensor  # (b,) where each begins; where a node passes through, that of its state
    sigma_next: Tensor  # (b,) where it ends
    noisy: Tensor  # (n,) int64, which of them are noisy
    scale: tuple[Tensor, ...]  # (b,) float32, factor of the noise rate; none where no plan scales, as samplers expect

    @classmethod
    def of(cls, how: Execution, plan: RolloutPlan, level: int, places: Places) -> Steps:
        """Those to all nodes of level + 1."""
        count, device = len(plan.prompt[level + 1]), how.sigmas.device
        scale = () if plan.scale is None else (torch.from_numpy(plan.scale[level]).float().to(device),)
        if plan.until is None:
            sigma, sigma_next = (how.sigmas[each].expand(count) for each in (level, level + 1))
        else:
            end = plan.until[level]
            begin = np.where(places.through[level][plan.parent[level]], end, level)
            sigma, sigma_next = (how.sigmas[torch.from_numpy(each).to(device)] for each in (begin, end))
        return cls(sigma, sigma_next, places.noisy[level].places, scale)

    def to(self, nodes: slice, noisy: slice) -> Steps:
        """Those to some nodes; `noisy`: which of the noisy ones that are."""
        scale = tuple(each[nodes] for each in self.scale)
        return Steps(self.sigma[nodes], self.sigma_next[nodes], self.noisy[noisy] - nodes.start, scale)


@dataclass(frozen=True)
class Reached:
    """Some nodes of one level."""

    latents: Tensor  # (b, *x) storage dtype
    log_prob: Tensor  # (b,) float32


def children(
    how: Execution, latents: Tensor, velocity: Tensor, steps: Steps, noise: Tensor, answers: Answers
) -> Reached:
    """The next states from each child's parent state (b, *x), with noise for those that are noisy."""
    following = deterministic(latents, velocity, steps).to(how.storage)
    densities = torch.zeros(len(latents), device=latents.device)
    rows = steps.noisy
    if len(rows):
        span = (steps.sigma[rows], steps.sigma_next[rows], *(scale[rows] for scale in steps.scale))
        gaussian = transition(how, latents[rows].float(), velocity[rows], *span)
        answers.transition(gaussian)
        spread = gaussian.std.view(-1, *(1 for _ in noise.shape[1:]))
        following[rows] = (gaussian.mean + spread * noise).to(how.storage)
        density = log_prob(how, gaussian, following[rows].float())
        answers.density(density, gaussian.std)
        densities[rows] = density
    return Reached(following, densities)


def deterministic(latents: Tensor, velocity: Tensor, steps: Steps) -> Tensor:  # (b, *x)
    """The next states without noise; a node that passes through keeps its state."""
    return euler(latents, velocity, steps.sigma, steps.sigma_next)


def followed(
    how: Execution, plan: RolloutPlan, level: int, velocity: Tensor, clean: Tensor, previous: Tensor | None
) -> Tensor:  # (b, *x)
    """The velocity that is followed from some nodes: the network's, or in a tail of order 2 the corrected one.

    The last step is of order 1, as published; the first one looks back at the last noisy step, as published.
    """
    tail = plan.tail
    if tail is None or tail.solver == "euler" or level < tail.start or previous is None or level == plan.num_steps - 1:
        return velocity
    before, now, following = (float(each) for each in tail.sigmas[level - 1 : level + 2])
    return second_order(velocity, clean, previous, (before, now, following))
