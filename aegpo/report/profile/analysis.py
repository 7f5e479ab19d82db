"""What a profile says: curves, chosen steps, allocation, and layers ranked by how much they vary and move."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from aegpo.core.parts import SelectorSpec
from aegpo.core.records import BoolArray, FloatArray, IntArray, Signal
from aegpo.core.signals import Signals
from aegpo.errors import AegpoError
from aegpo.method.planning import LATE
from aegpo.method.selectors import EntropyPeakSelector
from aegpo.method.signals.entropy import EntropySignal, entropy_options
from aegpo.method.signals.entropy_options import ENTROPY, ENTROPY_DELTA, entropy_change
from aegpo.report.profile.measure import Profile
from aegpo.report.profile.target import READS, Target

TOP_K = EntropyPeakSelector().top_k


@dataclass(frozen=True)
class Layer:
    """One layer in the block that is read."""

    name: str
    kind: str
    mean: float  # nats, over prompts and steps
    varies: float  # nats, standard deviation over steps of its mean curve
    moved: float | None  # nats, mean of |policy - base| over prompts and steps; None for the base alone


@dataclass(frozen=True)
class Analysis:
    """The profile of a target, and of its base."""

    target: Target
    base: Profile
    policy: Profile | None  # None: the base alone
    told: Mapping[str, FloatArray] | None = None  # the probe's own signals, where its options measure elsewhere

    @property
    def shown(self) -> Profile:
        """The policy, or the base where there is no other."""
        return self.policy or self.base

    @property
    def texts(self) -> tuple[str, ...]:
        """What the prompts say."""
        return self.target.texts

    @property
    def block(self) -> str:
        """The block that the experiment's selector and allocator read."""
        return self.options.block

    @property
    def options(self) -> EntropySignal:
        """How the experiment measures entropy."""
        return entropy_options(self.target.experiment)

    @property
    def sigmas(self) -> FloatArray:  # (T+1,)
        """Noise levels."""
        return self.target.experiment.sigmas

    def delta(self, block: str) -> FloatArray | None:  # (P,)
        """Mean |policy - base| of each prompt over all steps, each on its own trajectory; None for the base alone.

        In nats, whatever the experiment takes for its own delta: what that tells the parts, `counts` show.
        """
        if self.policy is None:
            return None
        return entropy_change(self.policy.curves(block), self.base.curves(block), "absolute")

    @cached_property
    def selector(self) -> SelectorSpec:
        """What chooses steps here: the experiment's selector, or entropy peaks where that reads no entropy."""
        spec = self.target.experiment.selector
        steps = self.target.experiment.rollouts.denoising_steps
        return spec if self._told("selector") else EntropyPeakSelector(top_k=min(TOP_K, steps - 1))

    @property
    def selector_is_foreign(self) -> bool:
        """True if the experiment itself chooses steps in another way."""
        return self.selector is not self.target.experiment.selector

    @cached_property
    def chosen(self) -> BoolArray:  # (P, T)
        """The steps that would be chosen for each prompt now."""
        return self.selector.build().select(self._signals(slice(None)), np.random.default_rng(0))

    @cached_property
    def counts(self) -> IntArray | None:  # (P,) rollouts, 0 for what is left over after whole training steps
        """Rollouts of each prompt if these prompts came in this order; None if the allocator reads no entropy."""
        spec = self.target.experiment
        if not self._told("allocator") or self.policy is None:
            return None
        each, counts = spec.rollouts.prompts_per_step, np.zeros(len(self.texts), dtype=np.int64)
        for first in range(0, len(self.texts) - each + 1, each):
            part = slice(first, first + each)
            signals, rng = self._signals(part), np.random.default_rng(0)
            counts[part] = spec.allocator.build().allocate(signals, spec.rollouts.rollouts_per_step, rng)
        return counts

    def _signals(self, rows: slice) -> Signals:
        """What the probe would tell the parts about some of the prompts, after any warm-up."""
        entropy, base = self.shown.curves(self.block)[rows].copy(), self.base.curves(self.block)[rows].copy()
        steps = self.options.measured(entropy.shape[1])
        if self.told is None:
            delta = entropy_change(entropy.take(steps, axis=1), base.take(steps, axis=1), self.options.delta)
        else:
            delta = self.told[ENTROPY_DELTA][rows]
        if self.told is not None and self.options.stride > 1:
            entropy = self.told[ENTROPY][rows].copy()
        entropy[:, np.setdiff1d(np.arange(entropy.shape[1]), steps)] = np.nan
        known = {ENTROPY: Signal("prompt-step", entropy), ENTROPY_DELTA: Signal("prompt", delta)}
        return Signals(LATE, len(entropy), self.sigmas, known)

    def _told(self, field: str) -> bool:
        """True if a part reads something, and nothing but what is profiled."""
        reads = self.target.experiment.reads.get(field, ())
        return bool(reads) and READS.issuperset(reads)

    @cached_property
    def peaks(self) -> IntArray:
        """Local maxima of the mean curve, ends included."""
        curve = np.pad(self.shown.curves(self.block).mean(axis=0), 1, constant_values=-np.inf)
        return np.flatnonzero((curve[1:-1] > curve[:-2]) & (curve[1:-1] >= curve[2:]))

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """The layers that have the block, from the one that varies most."""
        values, base = self.shown.blocks[self.block].entropy, self.base.blocks[self.block].entropy
        found = []
        for place, (name, kind) in enumerate(zip(self.shown.layers, self.shown.kinds, strict=True)):
            own, before = values[:, :, place], base[:, :, place]
            if np.isnan(own).all():
                continue
            moved = None if self.policy is None else float(np.abs(own - before).mean())
            found.append(Layer(name, kind, float(own.mean()), float(own.mean(axis=0).std()), moved))
        return tuple(sorted(found, key=lambda layer: -layer.varies))


def analyse(
    target: Target, base: Profile, policy: Profile | None, told: Mapping[str, FloatArray] | None = None
) -> Analysis:
    """The analysis of two profiles, and what the probe itself says if that is not in them.

    Raises:
        AegpoError: if the network does not have the block that the experiment reads.
    """
    block = entropy_options(target.experiment).block
    if block not in base.blocks:
        has = ", ".join(base.blocks)
        raise AegpoError(
            f"the experiment reads the block {block!r}, which these layers do not have; they "
            f"have {has}; set 'signals.entropy.block'"
        )
    return Analysis(target, base, policy, told)
