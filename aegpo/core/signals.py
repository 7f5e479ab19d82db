"""Signals: what is known about a step's prompts and denoising steps before their rollouts are planned.

A source measures signals; allocators, selectors and curricula read them by name. Decisions are numpy; the trunk, which
a source may hand on to the rollouts, is torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from aegpo.core.records import FloatArray, IntArray, RolloutPlan, Signal
from aegpo.errors import ContractError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Signals:
    """What chosen parts read about a step's prompts, by the name of each signal."""

    step: int  # of training, from 1
    num_prompts: int
    sigmas: FloatArray  # (T+1,) from 1 to 0
    known: Mapping[str, Signal] = field(default_factory=dict)

    @property
    def num_steps(self) -> int:
        """T, the denoising steps of a trajectory."""
        return len(self.sigmas) - 1

    def by_prompt(self, name: str) -> FloatArray:  # (P,)
        """A signal's value for each prompt; NaN where nothing is known.

        Raises:
            ContractError: if no source has measured it, or not for prompts.
        """
        signal = self._signal(name)
        if signal.per != "prompt":
            raise ContractError(f"signal {name!r} has values by {signal.per}, not one a prompt; choose another signal")
        return signal.values

    def by_step(self, name: str) -> FloatArray:  # (P, T)
        """A signal's value for each denoising step of each prompt; NaN at steps that were not measured.

        Raises:
            ContractError: if no source has measured it, or not for denoising steps.
        """
        signal = self._signal(name)
        if signal.per == "prompt":
            raise ContractError(f"signal {name!r} has values by prompt, none of denoising steps; choose another signal")
        return np.broadcast_to(signal.values, (self.num_prompts, self.num_steps))

    def measured(self, name: str) -> IntArray:
        """The denoising steps at which a signal is known for every prompt.

        Raises:
            ContractError: as `by_step`.
        """
        return np.flatnonzero(~np.isnan(self.by_step(name)).any(axis=0))

    def _signal(self, name: str) -> Signal:
        if name not in self.known:
            there = ", ".join(map(repr, self.known)) or "none"
            raise ContractError(
                f"no signal {name!r} was measured: a part reads what it declares, reads = ({name!r},); known: {there}"
            )
        return self.known[name]


@dataclass(frozen=True)
class Trunk:
    """Deterministic trajectories of some prompts that were computed already: trees may start with them.

    A prompt whose plan has one tree starts it from this noise, and what the network says along the tree's trunk, up to
    the first noisy step, is read off here.
    """

    prompt: IntArray  # (K,) rows of the step's Conditioning, each once
    noise: Tensor  # (K, *x)
    velocity: tuple[Tensor, ...] = ()  # (K, *x) float32 each, at the first levels

    def levels(self, plan: RolloutPlan) -> IntArray:  # (K,)
        """At how many levels of the plan the velocity of each prompt's only node is here."""
        return np.minimum(self.alone(plan), len(self.velocity))

    def alone(self, plan: RolloutPlan) -> IntArray:  # (K,)
        """At how many levels of the plan each prompt has one node only, which no noise has reached."""
        lengths = np.zeros(max(int(self.prompt.max()) + 1, len(plan.trunk_levels)), dtype=np.int64)
        lengths[: len(plan.trunk_levels)] = plan.trunk_levels
        return lengths[self.prompt]

    def saved(self, plan: RolloutPlan) -> int:
        """Velocity evaluations of the plan that need not be made."""
        return int(self.levels(plan).sum())


@dataclass(frozen=True)
class Measurement:
    """What a source found out about a step's prompts, and what that took."""

    values: Mapping[str, FloatArray]  # every signal that the source provides, (P,), (T,) or (P, T) float64
    forwards: int = 0  # velocity evaluations of single latents
    trunk: Trunk | None = None  # of prompts that were measured now, if rollouts may start from it


@dataclass(frozen=True)
class SignalCost:
    """What a source spends on one prompt, in velocity evaluations of single latents."""

    policy: int = 0  # of the policy, each time the prompt is measured
    base: int = 0  # of the base policy, once in a run
    refresh: int = 1  # training steps for which a measurement holds
    trunk: int = 0  # levels of a tree's trunk that take over what a measurement of the policy computed
    base_again: int = 0  # of the base policy, each time the prompt is measured
