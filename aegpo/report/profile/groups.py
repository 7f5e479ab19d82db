"""What a prompt's rollouts bring at a checkpoint: their rewards, and gradients from independent halves of its group.

The norm of one measured gradient is mostly noise: its square is on average that of the true gradient and all of the
noise's variance. The product of two gradients that share no noise is on average the true one's square alone.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from aegpo.core import contracts
from aegpo.core.interfaces import Stateful
from aegpo.core.records import FloatArray, Prompt
from aegpo.method.advantages.credit import crediting
from aegpo.method.scored_levels import scored_levels
from aegpo.method.trees import IndependentTree
from aegpo.train.engine import Engine
from aegpo.train.noise import StepNoise
from aegpo.train.predicted import PredictedScores
from aegpo.train.rollouts import roll_out
from aegpo.train.scoring import score

GROUP = 12  # rollouts of a prompt's group (DanceGRPO's size), in two halves
SQUARED_NORM = "squared gradient norm"
_AT_ONCE = 8  # prompts after which something is said

Gradient = Sequence[Tensor]  # of every trained weight


@dataclass(frozen=True)
class GroupValues:
    """What the groups of some prompts bring."""

    rewards: FloatArray  # (GROUP, P), the second half's after the first's
    squared_norms: FloatArray  # (P,) of the gradient of each prompt's loss; without bias, so some may be below 0
    cosines: FloatArray  # (P,) of the two halves' gradients; NaN where one of them is 0


def group_values(engine: Engine, prompts: Sequence[Prompt], say: Callable[[str], None]) -> GroupValues:
    """Rewards and gradients of independent rollouts of each prompt; nothing is learned from them."""
    rewards, products, cosines = [], [], []
    for row, prompt in enumerate(prompts):
        halves = [_half(engine, prompt, StepNoise(row, half)) for half in range(2)]
        rewards.append(np.concatenate([found for found, _ in halves]))
        first, second = (gradient for _, gradient in halves)
        products.append(_product(first, second))
        length = math.sqrt(_product(first, first) * _product(second, second))
        cosines.append(products[-1] / length if length else math.nan)
        if (row + 1) % _AT_ONCE == 0:
            say(f"prompts: gradients of {row + 1} of {len(prompts)}")
    return GroupValues(np.stack(rewards, axis=1), np.array(products), np.array(cosines))


def _half(engine: Engine, prompt: Prompt, noise: StepNoise) -> tuple[FloatArray, Gradient]:
    """(GROUP / 2,) rewards of rollouts of their own, and the gradient of the loss that they make by themselves."""
    count, levels = np.array([GROUP // 2]), len(engine.policy.how.sigmas) - 1
    noisy = np.arange(levels)[None] < levels - 1  # all but the last, as Flow-GRPO
    plan = IndependentTree().plan(count, noisy, np.random.default_rng(0))
    contracts.check_plan("independent", plan, count, noisy)
    cond, kind = engine.policy.model.encode([prompt]), engine.experiment.model.kind
    asked = scored_levels(engine.experiment, engine.advantage, plan)

    def inspect(images: Tensor) -> None:
        contracts.check_images(kind, images, len(images))

    predicted = PredictedScores(engine.policy.how, engine.rewards, plan, [prompt], asked, inspect)
    stranger = replace(prompt, index=len(engine.prompts) + prompt.index)  # no prompt that the advantage remembers
    rollouts = roll_out(engine.policy.how, plan, cond, noise, [stranger], look=predicted.look)
    scored = score(engine.rewards, rollouts.images, [prompt] * plan.num_rollouts)
    scores = torch.stack(list(scored.values()), dim=1)
    weights = torch.tensor([spec.weight for spec in engine.experiment.rewards], device=scores.device)
    with _unmoved(engine.advantage), crediting(engine.experiment.advantage.kind):
        credit = engine.advantage.estimate(predicted.beside(scores), weights, rollouts)
    gradient = engine.learner.gradients(rollouts, credit.to(scores.device), cond, noise)
    return (scores.double() @ weights.double()).cpu().numpy(), gradient


@contextmanager
def _unmoved(part: object) -> Iterator[None]:
    """Afterwards the part remembers what it did before, so that what it says of one half knows nothing of the other."""
    if not isinstance(part, Stateful):
        yield
        return
    before = copy.deepcopy(part.state_dict())
    try:
        yield
    finally:
        part.load_state_dict(before)


def _product(one: Gradient, other: Gradient) -> float:
    """The inner product, added up in float64."""
    return sum(float((a * b).sum(dtype=torch.float64)) for a, b in zip(one, other, strict=True))
