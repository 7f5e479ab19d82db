"""Credit against what a prompt earned in earlier training steps too."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from aegpo.core.experiment import Experiment
from aegpo.core.parts import AdvantageSpec
from aegpo.core.records import IntArray, RolloutPlan, Rollouts, Scores
from aegpo.method.advantages.credit import average_up, clamped, trained

if TYPE_CHECKING:
    from torch import Tensor


class RunningAdvantage(AdvantageSpec):
    """A rollout's reward against its prompt's last rewards, over training steps (DDPO).

    Each prompt keeps its last `buffer` rewards. From `least` of them on, they are what a reward is compared with; until
    then the whole step's rewards are. Stds divide by n. An edge that several rollouts pass through gets the mean.
    """

    kind: Literal["running"] = "running"
    buffer: int = Field(32, ge=2, le=1_000_000, description="rewards a prompt remembers (DDPO: 16 or 32)")
    least: int = Field(16, ge=2, le=1_000_000, description="rewards from which on they are used (DDPO: 16)")
    epsilon: float = Field(1e-6, gt=0, le=1, description="added to the std (DDPO)")
    clip: float | None = Field(
        5.0, gt=0, le=1e6, description="advantages are cut off at +- this; null: never (DDPO: 5)"
    )

    def cautions(self, experiment: Experiment) -> Iterator[str]:
        """A memory long enough to be used."""
        if self.least > self.buffer:
            yield (
                f"'least' {self.least} is more than the {self.buffer} rewards of 'buffer', so what a prompt earned "
                f"before is never used; lower 'least' to {self.buffer} or less, or use 'group'"
            )

    def build(self) -> RunningStatistics:
        """The advantage with its memory."""
        return RunningStatistics(self)


class RunningStatistics:
    """The last rewards of each prompt."""

    def __init__(self, spec: RunningAdvantage) -> None:
        self._spec = spec
        self._scores: dict[int, list[float]] = {}

    def levels(self, plan: RolloutPlan) -> IntArray:
        """Only rollouts are scored."""
        return self._spec.levels(plan)

    def estimate(self, scores: Scores, weights: Tensor, rollouts: Rollouts) -> Tensor:  # (E,)
        """Scores and (R,) weights -> the credit of each trained edge; remembers the scores."""
        import torch

        score = (scores.leaves.double() * weights.double()).sum(dim=1)
        asked = torch.tensor([prompt.index for prompt in rollouts.prompts])[rollouts.plan.group].to(score.device)
        advantage = torch.zeros_like(score)
        for prompt in torch.unique(asked).tolist():  # one that a step asks twice is one, as in DDPO
            members = asked == prompt
            kept = [*self._scores.get(prompt, []), *score[members].tolist()][-self._spec.buffer :]
            self._scores[prompt] = kept
            compared = score.new_tensor(kept) if len(kept) >= self._spec.least else score
            if bool((compared == compared[0]).all()):  # whose mean rounds
                compared = compared[:1]
            spread = compared.std(correction=0) + self._spec.epsilon
            advantage[members] = (score[members] - compared.mean()) / spread
        return trained(average_up(clamped(advantage, self._spec.clip), rollouts.plan), rollouts.plan)

    def report(self) -> dict[str, float]:
        """Prompts with any remembered score, and those with enough of them to be compared with their own."""
        enough = sum(len(scores) >= self._spec.least for scores in self._scores.values())
        return {"known_prompts": float(len(self._scores)), "settled_prompts": float(enough)}

    def state_dict(self) -> dict[str, Any]:
        """The remembered scores, by prompt."""
        return {"scores": {str(prompt): list(scores) for prompt, scores in self._scores.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` returned."""
        self._scores = {int(prompt): list(scores) for prompt, scores in state["scores"].items()}
