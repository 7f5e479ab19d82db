"""The levels whose predicted clean images an advantage wants scored beside the rollouts' own."""

from __future__ import annotations

import numpy as np

from aegpo.core import contracts, steps, untouched
from aegpo.core.experiment import Experiment
from aegpo.core.interfaces import Advantage
from aegpo.core.records import IntArray, RolloutPlan
from aegpo.errors import ContractError, PlanError
from aegpo.method.advantages.credit import FIRST_EDITION, crediting


def scored_levels(experiment: Experiment, advantage: object, plan: RolloutPlan) -> IntArray:
    """The levels of a plan whose predicted clean images are decoded and scored, rising; most advantages ask for none.

    Raises:
        ContractError: if the advantage fails, or returns what its interface forbids.
        PlanError: if a reward compares the images of a prompt, which has a single one at such a level, or a joined step
            passes over it.
    """
    kind = experiment.advantage.kind
    levels = asked_levels(kind, advantage, plan)
    with contracts.blaming("advantage", kind):
        for level in levels:
            _refuse_lone_images(experiment, plan, int(level))
            if steps.passing(plan)[level].any():
                raise PlanError(
                    f"advantage {kind!r} wants level {level} scored, but steps are joined there and the network says "
                    "nothing of it; choose a selector that joins none, or another advantage"
                )
    return levels


def asked_levels(kind: str, advantage: object, plan: RolloutPlan) -> IntArray:
    """The levels an advantage asks for, rising.

    Raises:
        ContractError: if it fails, or returns what its interface forbids.
    """
    with crediting(kind), untouched.sparing("advantage", kind, plan):
        if not isinstance(advantage, Advantage):
            raise ContractError(
                f"advantage {kind!r} has no levels(plan): {FIRST_EDITION}; use scores.leaves in estimate(scores, "
                "weights, rollouts), and let levels(plan) return an empty array of int64"
            )
        levels = advantage.levels(plan)
        if not _are_levels(levels, plan.num_steps):
            raise ContractError(
                f"advantage {kind!r} asked for levels {levels!r}; an array of int64 is right, each level of 0 to "
                f"{plan.num_steps - 1} at most once"
            )
    return np.sort(levels)


def _are_levels(levels: object, steps: int) -> bool:
    if not isinstance(levels, np.ndarray) or levels.ndim != 1 or levels.dtype != np.int64:
        return False
    found = levels.tolist()
    return len(set(found)) == len(found) and set(found) <= set(range(steps))


def _refuse_lone_images(experiment: Experiment, plan: RolloutPlan, level: int) -> None:
    labels = [spec.label for spec in experiment.rewards if spec.group_wise]
    nodes = np.bincount(plan.prompt[level])
    if labels and (nodes == 1).any():
        raise PlanError(
            f"reward {labels[0]!r} compares the images of one prompt, but at level {level}, which advantage "
            f"{experiment.advantage.kind!r} wants scored, prompt {np.flatnonzero(nodes == 1)[0]} of the step has a "
            "single node; choose tree 'independent' with 'start: own', or a reward that scores an image by itself"
        )
