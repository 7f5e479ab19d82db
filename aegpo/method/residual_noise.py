"""Noise that a plan leaves in images beyond what the schedule does."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from aegpo.core import steps
from aegpo.core.records import FloatArray, RolloutPlan, StepTable


def noise_levels(plan: RolloutPlan, table: StepTable, sigmas: FloatArray) -> tuple[FloatArray, ...]:
    """The std of the noise in every node's latents, T+1 arrays (N_i,), if the data were a single image.

    A perfect network then says v = x / sigma, so that a stochastic step with coefficients A_x and A_v takes noise w to
    w'^2 = (A_x + A_v / sigma)^2 w^2 + std^2, and a deterministic one keeps the schedule's share, w' = w sigma' / sigma.
    A schedule that is kept has w = sigma; what is more is noise the step added and never took out. `table` has the
    plan's steps, as `table_of` gives them.
    """
    sigmas = sigmas if plan.tail is None else plan.tail.sigmas
    levels: list[FloatArray] = [np.full(len(plan.prompt[0]), sigmas[0])]
    kinds, through, ends = steps.kinds(plan).of, steps.passing(plan), steps.ends(plan)
    for level, (parent, noisy) in enumerate(zip(plan.parent, plan.noisy, strict=True)):
        before = levels[-1][parent]
        following = before * sigmas[ends[level]] / sigmas[level]
        if noisy.any():
            kind = kinds[level]
            slope = table.latents[kind] + table.velocity[kind] / sigmas[level]
            stochastic = np.sqrt((slope * before) ** 2 + table.std[kind] ** 2)
            following = np.where(noisy, stochastic, following)
        levels.append(np.where(through[level][parent], before, following))
    return tuple(levels)


def residual_noise(plan: RolloutPlan, table: StepTable, sigmas: FloatArray, predicted_clean: bool = False) -> float:
    """Mean over rollouts of the noise in the final latents beyond the schedule's; see `noise_levels`."""
    if predicted_clean:  # the last steps of the images are deterministic
        last = steps.last_steps(plan)
        plan = replace(plan, noisy=tuple(noisy & ~end for noisy, end in zip(plan.noisy, last, strict=True)))
    final = noise_levels(plan, table, sigmas)[-1]
    return float(final.mean() - (sigmas if plan.tail is None else plan.tail.sigmas)[-1])
