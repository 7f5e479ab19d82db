"""What an objective sees: stored transitions, or clean latents noised again, evaluated under the current policy."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from aegpo.core import steps
from aegpo.core.records import BoolArray, Conditioning, Edges, IntArray, Renoised, RolloutPlan, Rollouts, Update
from aegpo.train.asking import Answers, log_prob, transition
from aegpo.train.execution import Execution
from aegpo.train.micro_batches import MicroBatch
from aegpo.train.noise import StepNoise


@dataclass(frozen=True)
class Batch:
    """One micro-batch of edges and what belongs to them."""

    edges: Edges
    credit: Tensor  # (E,) float32, of all edges
    cond: Conditioning  # of the training step's prompts
    micro: MicroBatch
    mean_std: float = 0.0  # of Update, from `schedule_std`; nothing in the forward process

    @property
    def rows(self) -> Tensor:  # (B,) int64
        """The edges of this micro-batch."""
        return self.micro.rows

    def spread(self, values: Tensor) -> Tensor:  # (B, ...)
        """Values (b, ...) of the states at which edges begin, for each edge."""
        return values if self.micro.of is None else values[self.micro.of]

    @property
    def begins(self) -> Tensor:  # (b, *x) float32
        """Where the network is evaluated."""
        return self.edges.states[self.edges.begin[self.micro.heads]].float()

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
    def reached(self) -> Tensor:  # (B, *x) float32
        """The state after each edge."""
        return self.edges.states[self.edges.end[self.rows]].float()

    @property
    def old_velocity(self) -> Tensor | None:  # (B, *x) float32
        """Of the policy that sampled, if it was kept."""
        return self._at_begin(self.edges.velocity)

    @property
    def base_velocity(self) -> Tensor | None:  # (B, *x) float32
        """Of the base policy, if it was asked."""
        return self._at_begin(self.edges.base_velocity)

    def _at_begin(self, values: Tensor | None) -> Tensor | None:
        return None if values is None else values[self.edges.begin[self.rows]]


def transitions(how: Execution, batch: Batch, answers: Answers) -> Update:
    """Evaluates stored transitions under the current policy, with gradient; `answers` are told what parts said."""
    level, begins = batch.level, batch.begins
    sigma, sigma_next = how.sigmas[level], how.sigmas[batch.until]
    span = (sigma, sigma_next, *batch.scale)
    velocity, latents = _velocity(how, batch, begins, answers), batch.spread(begins)

    def mean(other: Tensor | None) -> Tensor | None:
        return None if other is None else transition(how, latents, other, *span).mean

    gaussian = transition(how, latents, velocity, *span)
    density = log_prob(how, gaussian, batch.reached)
    base_mean, old_mean = mean(batch.base_velocity), mean(batch.old_velocity)
    answers.transition(replace(gaussian, mean=gaussian.mean.detach(), std=gaussian.std.detach()))
    answers.density(density.detach(), gaussian.std.detach())
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


def renoised(how: Execution, batch: Batch, answers: Answers) -> Renoised:
    """Evaluates clean latents that were noised again under the current policy, with gradient."""
    begins = batch.begins
    velocity = _velocity(how, batch, begins, answers)
    return Renoised(
        advantage=batch.credit[batch.rows],
        level=batch.level,
        sigma=how.sigmas[batch.level],
        latents=batch.spread(begins),
        clean=batch.reached,
        velocity=velocity,
        old_velocity=batch.old_velocity,
        base_velocity=batch.base_velocity,
        group=batch.group,
    )


@torch.no_grad()
def noise_again(how: Execution, rollouts: Rollouts, noise: StepNoise, shared: bool = False) -> Edges:
    """The trained edges of the forward process: each rollout's clean latents at its trained noise levels.

    x_sigma = (1 - sigma) x_0 + sigma noise; the noise is of the level and the rollout or, if it is `shared` by the
    rollouts of a prompt, of the level and the prompt. Each edge begins at a state of its own; behind these come the
    clean latents of all rollouts, where edges end.
    """
    edges = rollouts.edges
    if len(edges) == 0:
        return edges
    begin = torch.arange(len(edges), device=edges.level.device)
    row = edges.rollout - int(rollouts.plan.nodes[-1][0])
    owners = (edges.prompt if shared else edges.rollout).cpu().numpy()
    drawn = noise.again(edges.level.cpu().numpy(), owners, tuple(rollouts.latents.shape[1:])).to(how.sigmas.device)
    sigma = how.sigmas[edges.level].view(-1, *(1 for _ in drawn.shape[1:]))
    latents = (1 - sigma) * rollouts.latents[row].float() + sigma * drawn
    states = torch.cat([latents.to(how.storage), rollouts.latents])
    return replace(edges, begin=begin, end=len(edges) + row, states=states)


@torch.no_grad()
def velocities(how: Execution, edges: Edges, cond: Conditioning, wanted: BoolArray | None = None) -> Tensor:  # (V, *x)
    """What the network says now at the states where edges begin, float32; 0 where it is not `wanted`, (E,) bool."""
    answers, device = Answers(how), edges.states.device
    begin = edges.begin.cpu().numpy()
    heads = _first_wanted(begin, np.ones(len(begin), dtype=np.bool_) if wanted is None else wanted)
    count = int(begin[-1]) + 1 if len(begin) else 0
    found = torch.zeros((count, *edges.states.shape[1:]), device=device)
    for rows in torch.split(torch.from_numpy(heads).to(device), how.micro_batch):
        states = edges.begin[rows]
        chosen = cond.select(edges.prompt[rows])
        found[states] = how.velocity(edges.states[states].float(), how.sigmas[edges.level[rows]], chosen)
        answers.velocity(found[states])
    answers.verify()
    return found


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


def _velocity(how: Execution, batch: Batch, begins: Tensor, answers: Answers) -> Tensor:  # (B, *x)
    """The current policy's velocity, with gradient; what is known of it since sampling is not asked again.

    `begins`: of the batch, (b, *x).
    """
    retained, heads = batch.micro.retained, batch.micro.heads
    velocity = None if retained is None else retained.velocity
    if velocity is None:
        sigma, cond = how.sigmas[batch.edges.level[heads]], batch.cond.select(batch.edges.prompt[heads])
        velocity = how.velocity(begins, sigma, cond)
        answers.velocity(velocity.detach())
    return batch.spread(velocity)


def _first_wanted(begin: IntArray, wanted: BoolArray) -> IntArray:
    """The first wanted edge of each state that any begins at."""
    rows = np.flatnonzero(wanted)
    first: IntArray = rows[np.diff(begin[rows], prepend=-1) != 0]
    return first
