"""Executes a plan: walks its levels with one velocity evaluation for each unique node."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from aegpo import contracts
from aegpo.endings import second_order
from aegpo.interfaces import Model, Sampler
from aegpo.records import BoolArray, Conditioning, Edges, IntArray, Prompt, RolloutPlan, Rollouts
from aegpo.samplers import euler
from aegpo.trees import trunk_levels

Velocity = Callable[[Tensor, Tensor, Conditioning], Tensor]


@dataclass(frozen=True)
class Execution:
    """How plans are executed in a run."""

    model: Model
    velocity: Velocity  # the policy's, in the run's precision, float32 out
    sampler: Sampler
    sigmas: Tensor  # (T+1,)
    micro_batch: int
    storage: torch.dtype
    keep_velocity: bool = False  # of trained edges, for objectives that need the policy that sampled
    predicted_clean: bool = False  # images come from a deterministic last step, whatever the trained one did


@dataclass(frozen=True)
class Trunk:
    """Deterministic trajectories of some prompts that were computed already: trees may start with them.

    A prompt whose plan has one tree starts it from this noise, and what the network says along the tree's trunk, up to
    the first noisy step, is read off here.
    """

    prompt: IntArray  # (K,) rows of the step's Conditioning, each once
    noise: Tensor  # (K, C, H, W)
    velocity: tuple[Tensor, ...] = ()  # (K, C, H, W) float32 each, at the first levels

    def levels(self, plan: RolloutPlan) -> IntArray:  # (K,)
        """At how many levels of the plan the velocity of each prompt's only node is here."""
        return np.minimum(trunk_levels(plan)[self.prompt], len(self.velocity))

    def saved(self, plan: RolloutPlan) -> int:
        """Velocity evaluations of the plan that need not be made."""
        return int(self.levels(plan).sum())


@dataclass(frozen=True)
class _Level:
    """All children of one level."""

    latents: Tensor  # (N_{i+1}, C, H, W) storage dtype
    log_prob: Tensor  # (N_{i+1},) float32


@torch.no_grad()
def roll_out(
    how: Execution,
    plan: RolloutPlan,
    cond: Conditioning,
    generator: torch.Generator,
    prompts: Sequence[Prompt] = (),
    trunk: Trunk | None = None,
) -> Rollouts:
    """Samples every trajectory of a plan, level by level.

    Shared prefixes are one node and are computed once. Each new state is cast to the storage dtype first and its
    log-probability is that of the cast value, in float32, so that replaying a stored transition finds the same
    number. All noise comes from the CPU `generator`, in the plan's order; a `trunk` replaces what it has.
    """
    device = how.sigmas.device
    if plan.tail is not None:
        how = replace(how, sigmas=torch.from_numpy(plan.tail.sigmas).to(how.sigmas))
    noise = _start(how, plan, generator)
    if trunk is not None:
        rows, nodes = _on_trunk(trunk, plan, trunk_levels(plan)[trunk.prompt] > 0, 0)
        noise[nodes] = trunk.noise[rows]
    latents = start_latents(noise, how.sigmas).to(how.storage)
    log_probs: list[Tensor] = []
    edges: list[Edges] = []
    previous: Tensor | None = None  # what was predicted of the image one level before
    for level in range(plan.num_steps):
        velocity = _level_velocity(how, plan, level, latents, cond, trunk)
        parent = _index(plan.parent[level], device)
        clean = latents.float() - how.sigmas[level] * velocity
        followed = _followed(how, plan, level, velocity, clean, previous)
        previous = clean[parent]
        children = _children(how, latents[parent], followed[parent], level, plan.noisy[level], generator)
        kept = velocity[parent] if how.keep_velocity else None
        edges.append(_trained_edges(plan, level, latents[parent], children, kept))
        log_probs.append(children.log_prob)
        if how.predicted_clean and level == plan.num_steps - 1:
            latents = _deterministic(how, latents[parent], velocity[parent], level).to(how.storage)
        else:
            latents = children.latents
    latents = final_latents(latents, how.sigmas).to(how.storage)
    images = _decoded(how, latents.float())
    return Rollouts(plan, latents, images, tuple(log_probs), _joined(edges), tuple(prompts))


@torch.no_grad()
def sample_deterministic(how: Execution, noise: Tensor, cond: Conditioning) -> Tensor:
    """Euler from start noise (B, C, H, W) to images (B, 3, h, w) in [0, 1]; row i of `cond` belongs to row i."""
    latents, every = start_latents(noise, how.sigmas), torch.arange(len(noise), device=noise.device)
    for level, (sigma, sigma_next) in enumerate(zip(how.sigmas[:-1], how.sigmas[1:], strict=True)):
        velocity = batched_velocity(how, latents, level, cond, every)
        latents = euler(latents, velocity, sigma.expand(len(latents)), sigma_next.expand(len(latents)))
    return _decoded(how, final_latents(latents, how.sigmas))


def _decoded(how: Execution, latents: Tensor) -> Tensor:  # (B, 3, h, w)
    with contracts.blaming("model", type(how.model).__name__):
        return torch.cat([how.model.decode(part) for part in torch.split(latents, how.micro_batch)])


def start_latents(noise: Tensor, sigmas: Tensor) -> Tensor:
    """What pure noise (B, C, H, W) stands for at the first level, as in the published pipelines.

    Those of variance-preserving models (DDIM of SD 1.x and SDXL) begin below sigma 1 and take noise for the state
    x = a x0 + s noise there, which has its variance; in flow coordinates that is x / (a + s), with
    1 / (a + s) = sqrt(sigma^2 + (1 - sigma)^2). At sigma 1 it is the noise itself.
    """
    return noise * _spread(sigmas[0])


def final_latents(latents: Tensor, sigmas: Tensor) -> Tensor:
    """What stands for the image when the last level is reached: the state x there. At sigma 0 nothing changes."""
    return latents.float() / _spread(sigmas[-1])


def _spread(sigma: Tensor) -> Tensor:
    return (sigma.square() + (1 - sigma).square()).sqrt()


def batched_velocity(how: Execution, latents: Tensor, level: int, cond: Conditioning, prompt: Tensor) -> Tensor:
    """Velocity of (B, C, H, W) latents at one level, at most `micro_batch` at a time; `prompt`: (B,) rows of `cond`."""
    rows = torch.split(torch.arange(len(latents), device=latents.device), how.micro_batch)
    sigma = how.sigmas[level]
    return torch.cat([how.velocity(latents[r].float(), sigma.expand(len(r)), cond.select(prompt[r])) for r in rows])


def _level_velocity(
    how: Execution, plan: RolloutPlan, level: int, latents: Tensor, cond: Conditioning, trunk: Trunk | None
) -> Tensor:  # (N_i, C, H, W)
    """What the network says at every node of a level, evaluated only where the trunk does not know it."""
    prompt = _index(plan.prompt[level], latents.device)
    if trunk is None:
        return batched_velocity(how, latents, level, cond, prompt)
    rows, nodes = _on_trunk(trunk, plan, trunk.levels(plan) > level, level)
    if len(nodes) == 0:
        return batched_velocity(how, latents, level, cond, prompt)
    velocity = torch.empty_like(latents, dtype=torch.float32)
    velocity[nodes] = trunk.velocity[level][rows]
    others = torch.ones(len(latents), dtype=torch.bool, device=latents.device)
    others[nodes] = False
    if bool(others.any()):
        velocity[others] = batched_velocity(how, latents[others], level, cond, prompt[others])
    return velocity


def _on_trunk(trunk: Trunk, plan: RolloutPlan, chosen: BoolArray, level: int) -> tuple[Tensor, Tensor]:
    """Rows of the trunk (k,) among the `chosen` (K,) and the only node (k,) that each one's prompt has at a level."""
    device, rows = trunk.noise.device, np.flatnonzero(chosen)
    nodes = [int(np.flatnonzero(plan.prompt[level] == prompt)[0]) for prompt in trunk.prompt[rows]]
    return _index(rows, device), _index(np.array(nodes, dtype=np.int64), device)


def _children(
    how: Execution, latents: Tensor, velocity: Tensor, level: int, noisy: np.ndarray, generator: torch.Generator
) -> _Level:
    """The next level from each child's parent state (N_{i+1}, C, H, W)."""
    sigma = how.sigmas[level].expand(len(latents))
    sigma_next = how.sigmas[level + 1].expand(len(latents))
    following = _deterministic(how, latents, velocity, level).to(how.storage)
    log_prob = torch.zeros(len(latents), device=latents.device)
    rows = torch.from_numpy(np.flatnonzero(noisy)).to(latents.device)
    if len(rows):
        with contracts.blaming("sampler", type(how.sampler).__name__):
            gaussian = how.sampler.transition(latents[rows].float(), velocity[rows], sigma[rows], sigma_next[rows])
        noise = _noise(len(rows), how, generator)
        spread = gaussian.std.view(-1, *(1 for _ in noise.shape[1:]))
        following[rows] = (gaussian.mean + spread * noise).to(how.storage)
        with contracts.blaming("sampler", type(how.sampler).__name__):
            log_prob[rows] = how.sampler.log_prob(gaussian, following[rows].float())
    return _Level(following, log_prob)


def _followed(
    how: Execution, plan: RolloutPlan, level: int, velocity: Tensor, clean: Tensor, previous: Tensor | None
) -> Tensor:  # (N_i, C, H, W)
    """The velocity that is followed from every node: the network's, or in a tail of order 2 the corrected one.

    The last step is of order 1, as published; the first one looks back at the last noisy step, as published.
    """
    tail = plan.tail
    if tail is None or tail.solver == "euler" or level < tail.start or previous is None or level == plan.num_steps - 1:
        return velocity
    before, now, following = (float(each) for each in tail.sigmas[level - 1 : level + 2])
    return second_order(velocity, clean, previous, (before, now, following))


def _deterministic(how: Execution, latents: Tensor, velocity: Tensor, level: int) -> Tensor:
    """The step of a level without noise."""
    sigma, sigma_next = (how.sigmas[each].expand(len(latents)) for each in (level, level + 1))
    return euler(latents, velocity, sigma, sigma_next)


def _trained_edges(plan: RolloutPlan, level: int, latents: Tensor, children: _Level, velocity: Tensor | None) -> Edges:
    rows = np.flatnonzero(plan.trained[level])
    device = latents.device
    index = torch.from_numpy(rows).to(device)
    return Edges(
        level=torch.full((len(rows),), level, dtype=torch.int64, device=device),
        prompt=_index(plan.prompt[level + 1][rows], device),
        rollout=_index(plan.first_leaf[level + 1][rows], device),
        leaves=_index(plan.leaves[level + 1][rows], device),
        latents=latents[index],
        next_latents=children.latents[index],
        log_prob=children.log_prob[index],
        velocity=None if velocity is None else velocity[index],
    )


def _joined(parts: list[Edges]) -> Edges:
    velocities = [part.velocity for part in parts if part.velocity is not None]
    return Edges(
        level=torch.cat([part.level for part in parts]),
        prompt=torch.cat([part.prompt for part in parts]),
        rollout=torch.cat([part.rollout for part in parts]),
        leaves=torch.cat([part.leaves for part in parts]),
        latents=torch.cat([part.latents for part in parts]),
        next_latents=torch.cat([part.next_latents for part in parts]),
        log_prob=torch.cat([part.log_prob for part in parts]),
        velocity=torch.cat(velocities) if velocities else None,
    )


def _start(how: Execution, plan: RolloutPlan, generator: torch.Generator) -> Tensor:  # (N_0, C, H, W)
    """Start noise of every root; roots may share it."""
    if plan.start is None:
        return _noise(len(plan.prompt[0]), how, generator)
    return _noise(int(plan.start.max()) + 1, how, generator)[_index(plan.start, how.sigmas.device)]


def _noise(count: int, how: Execution, generator: torch.Generator) -> Tensor:
    return torch.randn((count, *how.model.latent_shape), generator=generator).to(how.sigmas.device)


def _index(array: IntArray, device: torch.device) -> Tensor:
    return torch.from_numpy(array).to(device)
