"""How much noise the stochastic steps of a plan leave in its images."""

from __future__ import annotations

import numpy as np

from aegpo.core.records import FloatArray, RolloutPlan, StepTable


def noise_levels(plan: RolloutPlan, table: StepTable, sigmas: FloatArray) -> tuple[FloatArray, ...]:
    """The std of the noise in every node's latents, T+1 arrays (N_i,), if the data were a single image.

    A perfect network then says v = x / sigma, so that a stochastic step with coefficients A_x and A_v takes noise w to
    w'^2 = (A_x + A_v / sigma)^2 w^2 + std^2, and a deterministic one keeps the schedule's share, w' = w sigma' / sigma.
    A schedule that is kept has w = sigma; what is more is noise the step added and never took out.
    """
    sigmas = sigmas if plan.tail is None else plan.tail.sigmas
    levels: list[FloatArray] = [np.full(len(plan.prompt[0]), sigmas[0])]
    for level, (parent, noisy) in enumerate(zip(plan.parent, plan.noisy, strict=True)):
        before = levels[-1][parent]
        following = before * sigmas[level + 1] / sigmas[level]
        if noisy.any():
            slope = table.latents[level] + table.velocity[level] / sigmas[level]
            stochastic = np.sqrt((slope * before) ** 2 + table.std[level] ** 2)
            following = np.where(noisy, stochastic, following)
        levels.append(following)
    return tuple(levels)


def residual_noise(plan: RolloutPlan, table: StepTable, sigmas: FloatArray, predicted_clean: bool = False) -> float:
    """Mean over rollouts of the noise in the final latents beyond the schedule's; see `noise_levels`."""
    levels = noise_levels(plan, table, sigmas)
    sigmas = sigmas if plan.tail is None else plan.tail.sigmas
    final = levels[-2][plan.parent[-1]] * sigmas[-1] / sigmas[-2] if predicted_clean else levels[-1]
    return float(final.mean() - sigmas[-1])
