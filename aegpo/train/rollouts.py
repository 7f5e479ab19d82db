"""From plans, or start noise, to images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from aegpo.core.records import Conditioning, Prompt, RolloutPlan, Rollouts
from aegpo.core.signals import Trunk
from aegpo.method.samplers import euler, final_latents, start_latents
from aegpo.train.asking import Answers, batched_velocity, decoded
from aegpo.train.edges import edge_table
from aegpo.train.execution import Execution, Look, Show, unseen
from aegpo.train.noise import StepNoise
from aegpo.train.retained import Retention
from aegpo.train.walking import Walk


@torch.no_grad()
def roll_out(
    how: Execution,
    plan: RolloutPlan,
    cond: Conditioning,
    noise: StepNoise,
    prompts: Sequence[Prompt] = (),
    trunk: Trunk | None = None,
    show: Show = unseen,
    look: Look | None = None,
    retention: Retention | None = None,
) -> Rollouts:
    """Samples every trajectory of a plan; `show` sees images, `look` what is predicted of them, while others wait.

    Shared prefixes are one node and are computed once. Each new state is cast to the storage dtype first and its
    log-probability is that of the cast value, in float32, so that replaying a stored transition finds the same
    number. All noise is `noise`'s, by level and node, so that it does not matter in which
    order nodes are reached; a `trunk` replaces what it has. `retention` keeps graphs of what is trained first.
    """
    if plan.tail is not None:
        how = replace(how, sigmas=torch.from_numpy(plan.tail.sigmas).to(how.sigmas))
    walk = Walk(how, plan, cond, noise, trunk, look, retention)
    latents: list[Tensor] = []
    images: list[Tensor] = []
    for leaves in walk.leaves():
        walk.answers.verify()
        latents.append(final_latents(leaves, how.sigmas).to(how.storage))
        images.append(decoded(how, latents[-1].float()))
        show(images[-1])
    log_probs = tuple(torch.cat(parts) for parts in walk.log_probs)
    edges = replace(edge_table(plan, walk.known, log_probs, walk.states), velocity=walk.velocity)
    return Rollouts(plan, torch.cat(latents), torch.cat(images), log_probs, edges, tuple(prompts))


@torch.no_grad()
def sample_deterministic(how: Execution, noise: Tensor, cond: Conditioning, show: Show = unseen) -> Tensor:
    """Euler from start noise (B, *x) to images (B, [F,] 3, h, w) in [0, 1]; row i of `cond` belongs to row i."""
    images: list[Tensor] = []
    answers = Answers(how)
    for rows in torch.split(torch.arange(len(noise), device=noise.device), how.micro_batch):
        latents = start_latents(noise[rows], how.sigmas)
        for level in range(len(how.sigmas) - 1):
            sigma, sigma_next = (how.sigmas[each].expand(len(latents)) for each in (level, level + 1))
            latents = euler(latents, batched_velocity(how, latents, level, cond, rows, answers), sigma, sigma_next)
        answers.verify()
        images.append(decoded(how, final_latents(latents, how.sigmas)))
        show(images[-1])
    return torch.cat(images)
