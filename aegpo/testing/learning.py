"""Conformance of the parts that sample and learn: samplers, advantages and objectives."""

from __future__ import annotations

from dataclasses import fields, replace
from itertools import product
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from aegpo.core import contracts
from aegpo.core.interfaces import Advantage, ForwardObjective, Objective, Sampler, Tree
from aegpo.core.parts import AdvantageSpec, ObjectiveSpec, SamplerSpec
from aegpo.core.records import IntArray, RolloutPlan, Scores
from aegpo.core.signatures import built
from aegpo.core.steps import check_scaling
from aegpo.errors import ContractError
from aegpo.method.advantages.credit import crediting
from aegpo.method.scored_levels import asked_levels
from aegpo.method.trained_edges import TrainedEdges
from aegpo.method.trees import BranchingTree, IndependentTree
from aegpo.testing.common import ROUNDING, check_equal, check_memory, check_spec, decision_rng, tree_inputs

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from aegpo.core.records import Renoised, Update

_U = TypeVar("_U", "Update", "Renoised")
_MATES = 2  # rows of a group of a made-up batch


def check_sampler(spec: SamplerSpec, steps: int = 10) -> None:
    """Transitions with finite means and stds for every step of a schedule, and densities highest at the mean.

    At half the noise rate there is less noise, and at 1 what there is without a `scale`.
    """
    import torch

    check_spec(spec)
    sampler = built("sampler", spec.kind, spec.build, Sampler)
    check_scaling(spec.kind, sampler)
    generator = torch.Generator().manual_seed(0)
    sigmas = torch.linspace(1.0, 0.0, steps + 1)
    latents, velocity, noise = (torch.randn((4, 2, 3, 3), generator=generator) for _ in range(3))
    for step in range(steps):
        sigma, sigma_next = sigmas[step].expand(4), sigmas[step + 1].expand(4)
        gaussian = sampler.transition(latents, velocity, sigma, sigma_next)
        contracts.check_transition(spec.kind, gaussian, latents)
        _check_rank(spec, latents, velocity, sigma, sigma_next)
        alone = sampler.transition(latents[:1], velocity[:1], sigma[:1], sigma_next[:1])
        if not torch.allclose(alone.mean[0], gaussian.mean[0], rtol=ROUNDING, atol=ROUNDING):
            raise ContractError(f"sampler {spec.kind!r} moves a latent differently alone and in a batch")
        once, half = (
            sampler.transition(latents, velocity, sigma, sigma_next, torch.full((4,), scale)) for scale in (1.0, 0.5)
        )
        contracts.check_transition(spec.kind, half, latents)
        if not all(torch.allclose(vars(once)[name], vars(gaussian)[name], ROUNDING, ROUNDING) for name in vars(once)):
            raise ContractError(f"sampler {spec.kind!r} takes another step at a 'scale' of 1 than without one")
        if bool((gaussian.std == 0).any()):
            continue
        if bool((half.std >= gaussian.std).any()):
            raise ContractError(
                f"sampler {spec.kind!r} adds no less noise at a 'scale' of 0.5 at step {step}; it is a factor of the "
                "noise rate"
            )
        drawn = gaussian.mean + gaussian.std.view(-1, 1, 1, 1) * noise
        log_prob, highest = sampler.log_prob(gaussian, drawn), sampler.log_prob(gaussian, gaussian.mean)
        contracts.check_log_prob(spec.kind, log_prob, latents)
        if bool((log_prob > highest).any()):
            raise ContractError(f"sampler {spec.kind!r} finds a drawn latent likelier than the mean at step {step}")


def _check_rank(spec: SamplerSpec, latents: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor) -> None:
    """Latents may have frames, too, or any other rank."""
    framed, sampler = latents[:, None], spec.build()
    with contracts.blaming("sampler", spec.kind):
        gaussian = sampler.transition(framed, velocity[:, None], sigma, sigma_next)
    contracts.check_transition(spec.kind, gaussian, framed)


def check_advantage(spec: AdvantageSpec) -> None:
    """Finite float32 credit for each trained edge, also where all scores are equal, and deterministic.

    It sees scores of predicted clean images at the levels it asks for, and at no others.
    """
    import torch

    check_spec(spec)
    first, second = built("advantage", spec.kind, spec.build, Advantage), spec.build()
    generator = torch.Generator().manual_seed(0)
    trees: tuple[Tree, ...] = (IndependentTree(), BranchingTree())
    inputs = list(tree_inputs())[::5]
    for tree, (counts, steps), rewards in product(trees, inputs, (1, 2)):
        rollouts = _rollouts(tree.plan(counts, steps, decision_rng()), generator)
        levels = asked_levels(spec.kind, first, rollouts.plan)
        who = f"advantage {spec.kind!r}"
        if not np.array_equal(levels, asked_levels(spec.kind, second, rollouts.plan)):
            raise ContractError(f"{who} asks for other levels of the same plan in two calls; let the plan alone decide")
        for scale, shift in ((1.0, 0.0), (0.0, 0.0), (0.0, -1e3)):  # any scores, and equal ones
            scores = _scores(rollouts.plan, levels, rewards, generator, scale, shift)
            with crediting(spec.kind):
                credit = first.estimate(scores, torch.ones(rewards), rollouts)
            contracts.check_credit(spec.kind, credit, rollouts.plan.trained_edges)
            check_equal(who, credit, second.estimate(scores, torch.ones(rewards), rollouts))
    again = (scores, torch.ones(rewards), rollouts)
    check_memory(f"advantage {spec.kind!r}", first, spec.build(), lambda part: part.estimate(*again))


def _scores(
    plan: RolloutPlan, levels: IntArray, rewards: int, generator: torch.Generator, scale: float, shift: float
) -> Scores:
    """Made-up scores of the rollouts and of some levels."""
    import torch

    def made_up(count: int) -> Tensor:
        return scale * torch.rand((count, rewards), generator=generator) + shift

    leaves = made_up(plan.num_rollouts)
    return Scores(leaves, {int(level): made_up(len(plan.prompt[level])) for level in levels})


def _rollouts(plan: RolloutPlan, generator: Any) -> Any:
    """Made-up rollouts of a plan: what an execution would return, with random numbers for latents."""
    import torch

    from aegpo.core.records import Prompt, Rollouts
    from aegpo.train.edges import edge_table

    known = TrainedEdges.of(plan)
    log_prob = tuple(torch.randn(len(nodes), generator=generator) for nodes in plan.prompt[1:])
    edges = edge_table(plan, known, log_prob, torch.randn((known.states, 1, 2, 2), generator=generator))
    images = torch.rand((plan.num_rollouts, 3, 4, 4), generator=generator)
    prompts = tuple(Prompt(index, f"prompt {index}") for index in range(int(plan.group.max()) + 1))
    return Rollouts(plan, images[:, :1, :2, :2], images, log_prob, edges, prompts)


def check_objective(spec: ObjectiveSpec) -> None:
    """A finite loss with a finite gradient for each row, before and after the policy has moved.

    It is the same whatever else is in the batch: the other rows, or those of other groups where that is its `scope`.
    """
    import torch

    check_spec(spec)
    objective = built("objective", spec.kind, spec.build, Objective, ForwardObjective)
    generator = torch.Generator().manual_seed(0)
    for size, moved in product((1, 6), (0.0, 1e-3, 0.5)):
        if objective.process == "forward":
            seen = _renoised(objective, size, moved, generator)
            inputs: tuple[Tensor, ...] = (seen.velocity,)
            loss, metrics = objective.loss(seen)
            alone = [objective.loss(_rows(seen, rows))[0] for rows in _units(spec, seen.group)]
        else:
            update = _update(objective, size, moved, generator)
            inputs = (update.log_prob, update.mean)
            loss, metrics = objective.loss(update)
            alone = [objective.loss(_rows(update, rows))[0] for rows in _units(spec, update.group)]
        contracts.check_loss(spec.kind, loss, metrics, size)
        gradients = torch.autograd.grad(loss.sum(), inputs, allow_unused=True)
        if not all(bool(gradient.isfinite().all()) for gradient in gradients if gradient is not None):
            raise ContractError(f"objective {spec.kind!r} has a gradient that is not finite")
        if not torch.allclose(torch.cat(alone), loss, rtol=ROUNDING, atol=ROUNDING):
            raise ContractError(
                f"objective {spec.kind!r} has other losses for the same {spec.scope} in a larger batch, so that the "
                "size of batches would change what is learned; compare rows of one 'group', with scope = \"groups\""
            )


def _units(spec: ObjectiveSpec, group: Tensor) -> tuple[Tensor, ...]:
    """The rows that a micro-batch may consist of: single ones, or a group."""
    import torch

    return torch.split(torch.arange(len(group)), _MATES if spec.scope == "groups" else 1)


def _rows(update: _U, rows: Tensor) -> _U:
    """A batch of the given rows only."""
    values = ((field.name, vars(update)[field.name]) for field in fields(update))
    return replace(
        update, **{name: value if value is None or name == "mean_std" else value[rows] for name, value in values}
    )


def _update(objective: Objective, size: int, moved: float, generator: torch.Generator) -> Update:
    """Made-up transitions of a policy that has moved away from the one that sampled."""
    import torch

    from aegpo.core.records import Update

    old, advantage, drift = (torch.randn(size, generator=generator) for _ in range(3))
    mean = torch.randn((size, 2, 3, 3), generator=generator).requires_grad_()
    std = torch.rand(size, generator=generator) + 0.1
    return Update(
        log_prob=(old + moved * drift).requires_grad_(),
        old_log_prob=old,
        advantage=advantage,
        mean=mean,
        base_mean=mean.detach() + moved if objective.needs_base else None,
        old_mean=mean.detach() - moved if objective.needs_old else None,
        std=std,
        delta=torch.full((size,), 0.1),
        level=torch.arange(size) // _MATES,
        mean_std=float(std.mean()),
        group=torch.arange(size) // _MATES,
    )


def _renoised(objective: ForwardObjective, size: int, moved: float, generator: torch.Generator) -> Renoised:
    """Made-up clean latents, noised again, under a policy that has moved away from the one that sampled."""
    import torch

    from aegpo.core.records import Renoised

    clean, noise, off = torch.randn((3, size, 2, 3, 3), generator=generator)
    sigma = torch.linspace(1.0, 0.1, size)[torch.arange(size) // _MATES]
    wide = sigma.view(-1, 1, 1, 1)
    velocity = (noise - clean + off).requires_grad_()
    return Renoised(
        advantage=torch.randn(size, generator=generator),
        level=torch.arange(size) // _MATES,
        sigma=sigma,
        latents=(1 - wide) * clean + wide * noise,
        clean=clean,
        velocity=velocity,
        old_velocity=velocity.detach() - moved if objective.needs_old else None,
        base_velocity=velocity.detach() + moved if objective.needs_base else None,
        group=torch.arange(size) // _MATES,
    )
