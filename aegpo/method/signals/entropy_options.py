"""How attention entropy is measured as a signal: its options and their cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Annotated, ClassVar, Literal, TypeAlias

import numpy as np
from pydantic import Field

from aegpo.core.experiment import Experiment
from aegpo.core.parts import SignalSpec
from aegpo.core.problems import Problem
from aegpo.core.records import FloatArray, Per
from aegpo.core.sections import NotNegative, Positive, Seed
from aegpo.core.signals import SignalCost
from aegpo.errors import SettingError

ENTROPY, ENTROPY_DELTA = "entropy", "entropy-delta"
Change: TypeAlias = Literal["absolute", "signed", "relative"]


class EntropyOptions(SignalSpec):
    """What is measured of attention entropy, what it costs, and where it is impossible. All options: our choices."""

    kind: Literal["entropy"] = "entropy"
    provides: ClassVar[Mapping[str, Per]] = {ENTROPY: "prompt-step", ENTROPY_DELTA: "prompt"}
    block: Literal["joint", "image-image", "image-text", "text-image", "text-text", "self", "cross"] = Field(
        default="joint",
        description="whose entropy: joint = every row over all keys; image-text and its like = the first's rows, the "
        "softmax renormalised over the second's keys; self, cross = a UNet's two kinds of layer (our choice: joint); "
        "with guidance, the mean of both evaluations. Padding words count where the network attends to them, as SD3 "
        "does",
    )
    steps: Literal["all"] | Annotated[tuple[NotNegative, ...], Field(min_length=1)] = Field(
        default="all",
        description="denoising steps that are measured, counted from 0; the trajectory ends after the last of them, "
        "and the others can neither be chosen by their entropy nor move delta (nothing is interpolated)",
    )
    stride: Positive = Field(
        default=1,
        description="denoising steps that one deterministic step of the probe spans, the policy's as the base's: with "
        "K, levels 0, K, 2K, ... are evaluated and measured, and entropy in between is interpolated linearly over "
        "steps; after the last of them it stays what it is there. Delta is the mean over the curve so filled. More "
        "than 1 needs `steps: all` (our choice: 1, the rollouts' own steps)",
    )
    rows: Literal["all"] | Positive = Field(
        default="all",
        description="query rows measured in each call: all, or so many of them, image and text alike in share",
    )
    layers: Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        default=("*",), description="layers whose mean is taken, by name; * and ? are wildcards"
    )
    samples: int = Field(default=1, ge=1, le=1000, description="start noises of each prompt whose curves are averaged")
    refresh: Positive = Field(
        default=1,
        description="training steps for which a prompt's curve holds; then it is measured when it comes again",
    )
    source: Literal["probe", "rollout"] = Field(
        default="probe",
        description="probe: trajectories of its own. rollout: a prompt with one tree starts it from the probe's first "
        "start noise, and the tree takes over the probe's evaluations up to its first noisy step, with a stride the "
        "first alone",
    )
    base_on: Literal["own", "policy"] = Field(
        default="own",
        description="whose latents the base policy is measured on for delta. own: those of its own trajectory from the "
        "same start noise, once a prompt, so that delta has the drift of the images in it. policy: the policy's, so "
        "that the weights alone differ; these are never kept, and cost the base's evaluations whenever a prompt is "
        "measured (our choice: own)",
    )
    delta: Change = Field(
        default="absolute",
        description="what delta is the mean of, over the measured steps: absolute = |H - H_base|, signed = H - H_base, "
        "both in nats, relative = (H - H_base) / H_base; the paper speaks of an absolute difference and of a relative "
        "change (our choice: absolute)",
    )
    seed: Seed = Field(
        default=0, description="start noise of the probe trajectories, fixed for each prompt, and which rows"
    )

    def measured(self, denoising_steps: int) -> tuple[int, ...]:
        """The denoising steps whose entropy is known, in order: measured, or interpolated with a stride."""
        return tuple(range(denoising_steps)) if self.steps == "all" else tuple(sorted(self.steps))

    def evaluated(self, denoising_steps: int) -> tuple[int, ...]:
        """The levels at which the network is evaluated along a trajectory, in order, from 0."""
        return tuple(range(0, self.measured(denoising_steps)[-1] + 1, self.stride))

    def tapped(self, denoising_steps: int) -> tuple[int, ...]:
        """The levels at which attention is measured, in order: the measured ones among those evaluated."""
        known = self.measured(denoising_steps)
        return tuple(level for level in self.evaluated(denoising_steps) if level in known)

    def cost(self, denoising_steps: int) -> SignalCost:
        """A trajectory to the last measured step for each sample of the policy; of the base as `base_on` says.

        With a stride the rollouts come by the probe's latents at level 0 alone.
        """
        levels = len(self.evaluated(denoising_steps))
        handed_on = levels if self.stride == 1 else 1
        trajectory, trunk = self.samples * levels, handed_on if self.source == "rollout" else 0
        if self.base_on == "policy":
            return SignalCost(trajectory, 0, self.refresh, trunk, self.samples * len(self.tapped(denoising_steps)))
        return SignalCost(trajectory, trajectory, self.refresh, trunk)

    def problems(self, experiment: Experiment) -> Iterator[Problem]:
        """A block the model lacks, steps that a trajectory does not have, and a trunk of another policy."""
        blocks, objective = experiment.model.attention_blocks, experiment.objective
        if blocks is not None and self.block not in blocks:
            message = f"model {experiment.model.kind!r} has no {self.block!r} attention; it has {', '.join(blocks)}"
            yield Problem(("block",), message)
        for message in self._wrong_steps(experiment.rollouts.denoising_steps):
            yield Problem(("steps",), message)
        for message in self._wrong_stride(experiment.rollouts.denoising_steps):
            yield Problem(("stride",), message)
        if self.source == "rollout" and objective.keeps_old:
            message = (
                f"objective {objective.kind!r} samples rollouts by an older policy than the one that is probed, so "
                "they cannot take over its evaluations; use 'probe'"
            )
            yield Problem(("source",), message)

    def _wrong_stride(self, denoising_steps: int) -> Iterator[str]:
        """A stride beside steps of one's own, or one that leaves nothing to interpolate between, in words."""
        if self.stride > 1 and self.steps != "all":
            yield (
                f"a stride of {self.stride} measures steps of its own and interpolates the others, but 'steps' names "
                "some; set 'steps: all', or 'stride: 1'"
            )
        elif self.stride >= max(denoising_steps, 2):
            yield (
                f"a stride of {self.stride} measures nothing but step 0 of a trajectory of {denoising_steps}, so "
                f"entropy has no curve; choose at most {max(denoising_steps - 1, 1)}"
            )

    def _wrong_steps(self, denoising_steps: int) -> Iterator[str]:
        """Steps that a trajectory does not have, or that are named twice, in words."""
        steps = self.measured(denoising_steps)
        if steps[-1] >= denoising_steps:
            yield f"no denoising step {steps[-1]}: a trajectory has {denoising_steps}, counted from 0"
        twice = [step for step, following in pairwise(steps) if step == following]
        if twice:
            yield f"step {twice[0]} is named twice; name it once"


def filled(curves: FloatArray) -> FloatArray:  # (P, T) -> (P, T)
    """Curves of P prompts that are measured at the same levels, NaN elsewhere, interpolated linearly over the step.

    Before the first and after the last measured level they stay what they are there (our choice).
    """
    every = np.arange(curves.shape[1])
    there = ~np.isnan(curves).all(axis=0)
    known = every[there]
    return np.stack([np.interp(every, known, curve[there]) for curve in curves])


def entropy_change(policy: FloatArray, base: FloatArray, how: Change) -> FloatArray:  # (P, K), (P, K) -> (P,)
    """Delta-entropy of P prompts: the mean over K measured steps of how far entropy moved from the base policy's.

    AEGPO, Sec. 3, where it is called an absolute difference and a relative change; the mean over steps is ours.

    Args:
        policy: entropies in nats.
        base: entropies in nats at the same prompts and steps.
        how: absolute, |H - H_base|; signed, H - H_base; relative, (H - H_base) / H_base.

    Raises:
        SettingError: if a change is asked relative to an entropy of 0.
    """
    moved = policy - base
    if how == "relative":
        if not np.all(base > 0):
            raise SettingError(
                "the base policy's entropy is 0 at a measured step, as where a row sees one key alone, so nothing is "
                "relative to it; use 'absolute' or 'signed', or another block",
                "signals",
                "entropy",
                "delta",
            )
        moved = moved / base
    change: FloatArray = (np.abs(moved) if how == "absolute" else moved).mean(axis=1)
    return change
