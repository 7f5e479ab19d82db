"""Credit of a step for what it gained: scores of predicted clean images, after it and before it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field

from aegpo.core.experiment import Experiment
from aegpo.core.records import IntArray, RolloutPlan, Rollouts
from aegpo.core.registry import Where
from aegpo.method.advantages.credit import (
    CombiningAdvantage,
    Judged,
    centred,
    clamped,
    deviations,
    of_each_step,
    standardised,
    trained,
)

if TYPE_CHECKING:
    from torch import Tensor


class GainAdvantage(CombiningAdvantage):
    """What a step gained: the score of the clean image predicted after it, less that before it (DenseGRPO).

    DenseGRPO (arXiv 2601.20218) rewards the step from x_t to x_{t-1} with R_{t-1} - R_t (Eq. 7). R_t is the reward of
    the clean image that n deterministic steps make of x_t (Eq. 8 and 9), and R_0 the rollout's own. Gains of a group at
    the same step are centred and divided by their std (Eq. 10).

    Deviation: n is 1, so that x0hat = x - sigma v; the next step needs v anyway, and no other evaluation is made. The
    paper trains with n = t. Its ablation (Sec. 5.3, Fig. 6c) has n = 1 below Flow-GRPO: rewards are made for clean
    images, and one long step is not. Calibrated noise (Sec. 4.2) is the sampler's affair. Ours: in a tree each trained
    edge counts once among those of its prompt and step, however many rollouts pass through it; one that is alone there
    gets no credit.
    """

    kind: Literal["gain"] = "gain"
    read_where: ClassVar[Mapping[str, Where]] = dict.fromkeys(
        ("unbiased", "epsilon"), Where("std", ("none",), other=True)
    )
    over: Literal["before", "nothing"] = Field(
        "before",
        description="what the score after a step is compared with: that before it (DenseGRPO), or nothing (its "
        "ablation, Dense Reward (Baseline), Sec. 5.3)",
    )
    std: Literal["none", "step", "prompt"] = Field(
        "step",
        description="divide by the std of the prompt's gains at the same step (DenseGRPO, Eq. 10), by that of all its "
        "centred gains, so that steps that decide little teach little (ours), or not",
    )
    unbiased: bool = Field(False, description="divide by n-1 in the std, or by n (Flow-GRPO, whose code it extends)")
    epsilon: float = Field(1e-4, gt=0, le=1, description="added to the std (Flow-GRPO)")
    clip: float | None = Field(5.0, gt=0, le=1e6, description="advantages are cut off at +- this; null: never (all: 5)")

    def levels(self, plan: RolloutPlan) -> IntArray:
        """Before and after every step with a trained edge; after the last one there is the rollout's own score."""
        steps = {level for level, mask in enumerate(plan.trained) if mask.any()}
        before = steps if self.over == "before" else set[int]()
        after = {level + 1 for level in steps} - {plan.num_steps}
        return np.array(sorted(before | after), dtype=np.int64)

    def gains(self, score: Judged, plan: RolloutPlan) -> list[Tensor]:  # T+1 tensors (N_i,)
        """The gain of the edge to each node; 0 at steps without a trained edge, and for roots."""
        import torch

        found = [score.leaves.new_zeros(len(nodes)) for nodes in plan.prompt]
        for level, parent in enumerate(plan.parent):
            if not plan.trained[level].any():
                continue
            after = score.leaves if level == plan.num_steps - 1 else score.nodes[level + 1]
            before = torch.from_numpy(parent).to(after.device)
            found[level + 1] = after - score.nodes[level][before] if self.over == "before" else after
        return found

    def normalised(self, score: Judged, rollouts: Rollouts) -> list[Tensor]:  # T+1 tensors (N_i,)
        """Scores -> the advantage of every node whose edge is trained; 0 for others."""
        gains = self.gains(score, rollouts.plan)
        if self.std == "step":
            return of_each_step(gains, rollouts.plan, standardised(self.unbiased, self.epsilon))
        values = of_each_step(gains, rollouts.plan, centred)
        return values if self.std == "none" else self._over_prompts(values, rollouts.plan)

    def _over_prompts(self, values: list[Tensor], plan: RolloutPlan) -> list[Tensor]:
        """Centred gains over the std of all that their prompt has."""
        import torch

        chosen = [value[torch.from_numpy(mask)] for value, mask in zip(values[1:], plan.trained, strict=True)]
        owners = [prompts[mask] for prompts, mask in zip(plan.prompt[1:], plan.trained, strict=True)]
        group = torch.from_numpy(np.concatenate(owners)).to(values[0].device)
        if len(group) == 0:
            return values
        spread = values[0].new_zeros(int(plan.group.max()) + 1)
        spread[group] = deviations(torch.cat(chosen), group, self.unbiased).nan_to_num()
        rows = (torch.from_numpy(prompts).to(spread.device) for prompts in plan.prompt)
        return [value / (spread[row] + self.epsilon) for value, row in zip(values, rows, strict=True)]

    def finished(self, values: list[Tensor], rollouts: Rollouts) -> Tensor:  # (E,)
        """Advantages of nodes -> the credit of each trained edge."""
        return trained([clamped(level, self.clip) for level in values], rollouts.plan)

    def cautions(self, experiment: Experiment) -> Iterator[str]:
        """Steps are credited, so steps should be learned from."""
        if experiment.objective.process == "forward":
            yield (
                f"'gain' credits single steps, but objective {experiment.objective.kind!r} learns from clean images "
                "that are noised again, which no single step made; use 'group'"
            )
