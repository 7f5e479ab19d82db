"""Parts that break the rules, one rule each; importable without torch, as every spec must be."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

import numpy as np
from pydantic import ConfigDict, Field

from aegpo.core.hookspecs import hookimpl
from aegpo.core.parts import (
    AdvantageSpec,
    AllocatorSpec,
    ObjectiveSpec,
    RewardSpec,
    SamplerSpec,
    SelectorSpec,
    TrackerSpec,
    TreeSpec,
)
from aegpo.method.advantages import GainAdvantage
from aegpo.method.samplers import FlowSde
from aegpo.method.trees import IndependentTree
from aegpo.rewards.palette import PaletteReward


class Lopsided(AllocatorSpec):
    """Everything for the first prompt."""

    kind: Literal["lopsided"] = "lopsided"

    def allocate(self, signals, budget, rng):
        counts = np.full(signals.num_prompts, 2, dtype=np.int64)
        counts[0] = budget - 2 * (signals.num_prompts - 1) - (budget > 20)
        return counts


class Dicey(SelectorSpec):
    """Draws from a generator nobody gave it."""

    kind: Literal["dicey"] = "dicey"

    def select(self, signals, rng):
        selected = np.random.default_rng().random((signals.num_prompts, signals.num_steps)) < 0.5
        selected[:, 0] = True
        return selected


class Choosy(SelectorSpec):
    """Nothing suits it."""

    kind: Literal["choosy"] = "choosy"

    def select(self, signals, rng):
        return np.ones((signals.num_prompts, signals.num_steps), dtype=np.bool_)

    def problems(self, experiment):
        yield "no"


class Overlapping(SelectorSpec):
    """Joins each step to the one after it."""

    kind: Literal["overlapping"] = "overlapping"

    def select(self, signals, rng):
        return np.ones((signals.num_prompts, signals.num_steps), dtype=np.bool_)

    def merge(self, selected):
        ends = np.arange(selected.shape[1]) + 2
        return np.tile(np.minimum(ends, selected.shape[1]), (len(selected), 1))


class Stump(TreeSpec):
    """Loses a leaf."""

    kind: Literal["stump"] = "stump"

    def plan(self, counts, steps, rng):
        return IndependentTree().plan(counts - 1, steps, rng)


class Silencer(TreeSpec):
    """Scales noise by nothing."""

    kind: Literal["silencer"] = "silencer"

    def plan(self, counts, steps, rng):
        plan = IndependentTree().plan(counts, steps, rng)
        return replace(plan, scale=tuple(np.zeros(len(parent)) for parent in plan.parent))


class Bygone(SamplerSpec):
    """Flow-GRPO's step, as a sampler of version 0.1 took it."""

    kind: Literal["bygone"] = "bygone"

    def transition(self, latents, velocity, sigma, sigma_next):
        return FlowSde().transition(latents, velocity, sigma, sigma_next)

    def log_prob(self, gaussian, next_latents):
        return FlowSde().log_prob(gaussian, next_latents)


class Deaf(Bygone):
    """Does not heed the scale."""

    kind: Literal["deaf"] = "deaf"  # type: ignore[assignment]

    def transition(self, latents, velocity, sigma, sigma_next, scale=None):
        return FlowSde().transition(latents, velocity, sigma, sigma_next)


class Loud(Bygone):
    """Means another factor."""

    kind: Literal["loud"] = "loud"  # type: ignore[assignment]

    def transition(self, latents, velocity, sigma, sigma_next, scale=None):
        return FlowSde().transition(latents, velocity, sigma, sigma_next, None if scale is None else 2 * scale)


class Neighbourly(RewardSpec):
    """Scores an image by the whole batch."""

    kind: Literal["neighbourly"] = "neighbourly"

    def score(self, images, prompts):
        return images.mean(dim=(1, 2, 3)) - images.mean()


class Scribbler(RewardSpec):
    """Draws on what it is given."""

    kind: Literal["scribbler"] = "scribbler"

    def score(self, images, prompts):
        images.zero_()
        return images.new_zeros(len(images))


class Dated(AdvantageSpec):
    """Takes a tensor of scores, as in the first edition."""

    kind: Literal["dated"] = "dated"

    def estimate(self, rewards, weights, rollouts):
        return (rewards * weights).sum(dim=1)


class Curious(GainAdvantage):
    """Reads a level it did not ask for."""

    kind: Literal["curious"] = "curious"  # type: ignore[assignment]

    def levels(self, plan):
        return super().levels(plan)[1:]


class Fickle(GainAdvantage):
    """Asks for another level in every second call."""

    kind: Literal["fickle"] = "fickle"  # type: ignore[assignment]

    def levels(self, plan):
        CALLS.append(plan)
        return np.array([len(CALLS) % 2])


CALLS: list[object] = []


class Detached(ObjectiveSpec):
    """Cannot be learned from."""

    kind: Literal["detached"] = "detached"

    def loss(self, update):
        return update.log_prob.detach(), {}


class Comparing(ObjectiveSpec):
    """Compares the rows of a batch without saying so."""

    kind: Literal["comparing"] = "comparing"

    def loss(self, update):
        return update.advantage * (update.log_prob - update.log_prob.mean()), {}


class Mixing(Comparing):
    """Says that it compares the rows of a group, and compares those of the batch."""

    kind: Literal["mixing"] = "mixing"  # type: ignore[assignment]
    scope: ClassVar[Literal["rows", "groups"]] = "groups"


class Silent(TrackerSpec):
    """Watches nothing."""

    kind: Literal["silent"] = "silent"

    def build(self, folder):
        return object()


class Mumbler(TrackerSpec):
    """Watches what never happens."""

    kind: Literal["mumbler"] = "mumbler"

    def build(self, folder):
        class Observer:
            @hookimpl
            def aegpo_on_step_done(self, report):
                pass

        return Observer()


class Undescribed(RewardSpec):
    """A field nobody explains."""

    kind: Literal["undescribed"] = "undescribed"
    power: float = 1.0


class Tolerant(RewardSpec):
    """Takes any key."""

    model_config = ConfigDict(extra="allow")
    kind: Literal["tolerant"] = "tolerant"


class Forgetful(PaletteReward):
    """Does not read back what it writes."""

    kind: Literal["forgetful"] = "forgetful"  # type: ignore[assignment]
    secret: int = Field(0, exclude=True, description="is not written")


class Memory:
    """Chooses the next step in every call, and stores nothing of it."""

    def __init__(self):
        self.calls = 0

    def select(self, signals, rng):
        self.calls += 1
        selected = np.zeros((signals.num_prompts, signals.num_steps), dtype=bool)
        selected[:, min(self.calls, signals.num_steps) - 1] = True
        return selected

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


class Amnesiac(SelectorSpec):
    """Loses its memory in a checkpoint."""

    kind: Literal["amnesiac"] = "amnesiac"

    def build(self):
        return Memory()
