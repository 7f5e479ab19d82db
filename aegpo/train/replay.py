"""What an objective sees: stored transitions, or clean latents noised again, evaluated under the current policy."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from aegpo.core import steps
from aegpo.core.interfaces import ForwardObjective, Objective
from aegpo.core.records import Conditioning, Edges, Renoised, RolloutPlan, Rollouts, Update
from aegpo.train.asking import Answers, log_prob, transition
from aegpo.train.execution import Execution
from aegpo.train.noise import StepNoise


@dataclass(frozen=True)
class Batch:
    """One micro-batch of edges and what belongs to them."""

    edges: Edges
    credit: Tensor  # (E,) float32, of all edges
    cond: Conditioning  # of the training step's prompts
    rows: Tensor  # (B,) int64, the edges of this micro-batch
    mean_std: float = 0.0  # of Update, from `schedule_std`; nothing in the forward process

    @property
    def latents(self) -> Tensor:  # (B, *x) float32
        """Where the network is evaluated."""
        return self.edges.latents[self.rows].float()

    @property
    def level(self) -> Tensor:  # (B,) int64
        """The denoising step of each edge."""
        return self.edges.level[self.rows]

    @property
    def until(self) -> Tensor:  # (B,) int64
        """The level at which the step of each edge ends."""
        return self.level + 1 if self.edges.until is None else self.edges.until[self.rows]

    @property
    def scale(self) -> tuple[Tensor, ...]:  # (B,) float32
        """The factor of each edge's noise rate, or nothing: samplers are given one only where the plan scales noise."""
        return () if self.edges.scale is None else (self.edges.scale[self.rows],)

    @property
    def group(self) -> Tensor:  # (B,) int64
        """The group of each edge."""
        return self.edges.group[self.rows]

    @property
    def conditioning(self) -> Conditioning:
        """The prompt of each edge."""
        return self.cond.select(self.edges.prompt[self.rows])

    @property
    def old_velocity(self) -> Tensor | None:  # (B, *x) float32
        """Of the policy that sampled, if it was kept."""
        return None if self.edges.velocity is None else self.edges.velocity[self.rows]


def transitions(how: Execution, objective: Objective, batch: Batch) -> Update:
    """Evaluates stored transitions under the current policy, with gradient."""
    latents, level = batch.latents, batch.level
    sigma, sigma_next = how.sigmas[level], how.sigmas[batch.until]
    span = (sigma, sigma_next, *batch.scale)
    velocity, base_velocity = _velocities(how, objective, batch)

    def mean(other: Tensor | None) -> Tensor | None:
        return None if other is None else transition(how, latents, other, *span).mean

    gaussian = transition(how, latents, velocity, *span)
    density = log_prob(how, gaussian, batch.edges.next_latents[batch.rows].float())
    base_mean, old_mean = mean(base_velocity), mean(batch.old_velocity)
    answers = Answers(how)
    for said in (velocity, base_velocity):
        if said is not None:
            answers.velocity(said.detach())
    answers.transition(replace(gaussian, mean=gaussian.mean.detach(), std=gaussian.std.detach()))
    answers.density(density.detach(), gaussian.std.detach())
    answers.verify()
    return Update(
        log_prob=density,
        old_log_prob=batch.edges.log_prob[batch.rows],
        advantage=batch.credit[batch.rows],
        mean=gaussian.mean,
        base_mean=base_mean,
        old_mean=old_mean,
        std=gaussian.std,
        delta=sigma - sigma_next,
        level=level,
        mean_std=batch.mean_std,
        group=batch.group,
    )


def renoised(how: Execution, objective: ForwardObjective, batch: Batch) -> Renoised:
    """Evaluates clean latents that were noised again under the current policy, with gradient."""
    velocity, base_velocity = _velocities(how, objective, batch)
    answers = Answers(how)
    for said in (velocity, base_velocity):
        if said is not None:
            answers.velocity(said.detach())
    answers.verify()
    return Renoised(
        advantage=batch.credit[batch.rows],
        level=batch.level,
        sigma=how.sigmas[batch.level],
        latents=batch.latents,
        clean=batch.edges.next_latents[batch.rows].float(),
        velocity=velocity,
        old_velocity=batch.old_velocity,
        base_velocity=base_velocity,
        group=batch.group,
    )


@torch.no_grad()
def noise_again(how: Execution, rollouts: Rollouts, noise: StepNoise, shared: bool = False) -> Edges:
    """The trained edges of the forward process: each rollout's clean latents at its trained noise levels.

    x_sigma = (1 - sigma) x_0 + sigma noise; the noise is of the level and the rollout or, if it is `shared` by the
    rollouts of a prompt, of the level and the prompt.
    """
    edges = rollouts.edges
    if len(edges) == 0:
        return edges
    clean = rollouts.latents[edges.rollout - int(rollouts.plan.nodes[-1][0])]
    owners = (edges.prompt if shared else edges.rollout).cpu().numpy()
    drawn = noise.again(edges.level.cpu().numpy(), owners, tuple(clean.shape[1:])).to(clean.device)
    sigma = how.sigmas[edges.level].view(-1, *(1 for _ in clean.shape[1:]))
    latents = (1 - sigma) * clean.float() + sigma * drawn
    return replace(edges, latents=latents.to(how.storage), next_latents=clean)


@torch.no_grad()
def velocities(how: Execution, edges: Edges, cond: Conditioning) -> Tensor:
    """(E, *x) float32: what the policy predicts now at every edge."""
    found, answers = [edges.latents[:0].float()], Answers(how)
    for rows in torch.split(torch.arange(len(edges), device=edges.level.device), how.micro_batch):
        chosen = cond.select(edges.prompt[rows])
        found.append(how.velocity(edges.latents[rows].float(), how.sigmas[edges.level[rows]], chosen))
        answers.velocity(found[-1])
    answers.verify()
    return torch.cat(found)


def schedule_std(how: Execution, plan: RolloutPlan) -> float:
    """Mean transition std over all denoising steps but the last: what `step_weight: std` is relative to.

    Where steps differ between the edges of a level, each counts as often as rollouts pass through it.
    """
    if plan.until is None and plan.scale is None:
        sigmas = how.sigmas[:-1]
        nothing = sigmas.new_zeros(len(sigmas) - 1, 1, 1, 1)
        return float(transition(how, nothing, nothing, sigmas[:-1], sigmas[1:]).std.mean())
    sigmas = how.sigmas if plan.tail is None else torch.from_numpy(plan.tail.sigmas).to(how.sigmas)
    kinds = steps.kinds(plan)
    level, until = (torch.from_numpy(each).to(sigmas.device) for each in (kinds.level, kinds.until))
    scale = () if kinds.scale is None else (torch.from_numpy(kinds.scale).to(sigmas),)
    nothing = sigmas.new_zeros(len(level), 1, 1, 1)
    std = transition(how, nothing, nothing, sigmas[level], sigmas[until], *scale).std
    passes = np.zeros(len(level))
    for kind, leaves in zip(kinds.of, plan.leaves[1:], strict=True):
        np.add.at(passes, kind[kind >= 0], leaves[kind >= 0])
    inner = kinds.until < plan.num_steps
    share = torch.from_numpy(passes * inner if inner.any() else passes).to(sigmas)
    return float((share * std).sum() / share.sum())


def _velocities(how: Execution, objective: Objective | ForwardObjective, batch: Batch) -> tuple[Tensor, Tensor | None]:
    """The current policy's velocity, with gradient, and the base policy's if the objective reads it."""
    latents, sigma, cond = batch.latents, how.sigmas[batch.level], batch.conditioning
    velocity = how.velocity(latents, sigma, cond)
    if not objective.needs_base:
        return velocity, None
    with torch.no_grad(), how.model.frozen("base"):
        return velocity, how.velocity(latents, sigma, cond)
