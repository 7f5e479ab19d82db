"""The seams of the engine: protocols that its parts fulfil. Shapes are as in aegpo/core/records.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import numpy as np

from aegpo.core.records import (
    AttentionCall,
    BoolArray,
    Conditioning,
    Gaussian,
    IntArray,
    Prompt,
    Renoised,
    RolloutPlan,
    Rollouts,
    Scores,
    Update,
)
from aegpo.core.signals import Measurement, Signals

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


class Model(Protocol):
    """A text-to-image network in flow coordinates: x_sigma = (1 - sigma) x0 + sigma noise, v = noise - x0."""

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """x: (C, H, W), with frames (C, F, H, W), or of any other rank."""

    @property
    def policy(self) -> nn.Module:
        """The module that is trained and saved."""

    def encode(self, prompts: Sequence[Prompt]) -> Conditioning:
        """Conditioning of P prompts: of their texts, and of their images if its spec `reads_images`."""

    def sigmas(self, steps: int) -> Tensor:
        """(steps+1,) float32 noise levels from 1 to 0, strictly falling.

        A spec with a `partial_schedule` may begin below 1 and end above 0, as DDIM of SD 1.x does.
        """

    def velocity(self, latents: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """(B, *x), (B,) -> (B, *x): d x / d sigma at the given noise levels."""

    def decode(self, latents: Tensor) -> Tensor:
        """(B, *x) -> images (B, 3, h, w) in [0, 1]; (B, F, 3, h, w) where its spec's `media` is "video"."""

    def frozen(self, name: str) -> AbstractContextManager[None]:
        """Inside, `velocity` is that frozen network's. `base`, the policy before it was trained, is always one of them.

        Raises:
            AegpoError: if it has none of that name; the message lists those it has.
        """

    def tap_attention(self, tap: Callable[[AttentionCall], None]) -> AbstractContextManager[None]:
        """Inside, `tap` sees every attention call; the network's output does not change."""


@runtime_checkable
class Preparable(Protocol):
    """A model that works on prompts ahead, so that no text encoder is needed in between."""

    def prepare(self, prompts: Sequence[Prompt]) -> None:
        """Takes note of every prompt that `encode` will be asked for."""


@runtime_checkable
class Resizable(Protocol):
    """A model that paints images of more than one size."""

    def at(self, height: int, width: int) -> Model:
        """The same network, weights and all, for images of another size in pixels; it is asked to `encode` for them."""


class Policy(Protocol):
    """The network of a run, as sources of signals may ask it; what it says is in the run's precision."""

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """x: (C, H, W), with frames (C, F, H, W), or of any other rank."""

    @property
    def sigmas(self) -> Tensor:
        """(T+1,) the noise levels of training."""

    @property
    def storage(self) -> torch.dtype:
        """In which dtype rollouts keep latents from one step to the next."""

    @property
    def micro_batch(self) -> int:
        """How many latents go through the network at once."""

    def encode(self, prompts: Sequence[Prompt]) -> Conditioning:
        """Conditioning of P prompts."""

    def velocity(self, latents: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """(B, *x), (B,) -> (B, *x) float32: d x / d sigma at the given noise levels."""

    def decode(self, latents: Tensor) -> Tensor:
        """(B, *x) -> images (B, [F,] 3, h, w) in [0, 1]."""

    def shared_out(self, count: int, work: Callable[[slice], Sequence[Tensor]]) -> tuple[Tensor, ...]:
        """What `work` finds out about `count` >= 1 things, some of which each process does; all of them get all of it.

        `work` is asked about neighbours, at least one of them, and gives tensors with a row for each, always as many.
        """

    def start_noise(self, prompts: Sequence[Prompt], seed: int, sample: int = 0) -> Tensor:
        """(P, *x): one fixed noise for each prompt, seed and sample, whenever it is asked for."""

    def base(self) -> AbstractContextManager[None]:
        """Inside, the frozen base policy speaks."""

    def tap_attention(self, tap: Callable[[AttentionCall], None]) -> AbstractContextManager[None]:
        """Inside, `tap` sees every attention call; the network's output does not change."""


@runtime_checkable
class SignalSource(Protocol):
    """Measures what other parts decide by."""

    def measure(self, step: int, prompts: Sequence[Prompt], policy: Policy) -> Measurement:
        """P prompts of a training step, counted from 1 -> every signal that the spec `provides`.

        A pure function of the policy, the prompts and what was measured before: draws come from generators of its own.
        """


@runtime_checkable
class Rewarded(Protocol):
    """A source that learns from what prompts brought."""

    def rewarded(self, prompts: Sequence[Prompt], rewards: Tensor, group: IntArray) -> None:
        """A step's P prompts, (N,) weighted rewards of its rollouts, and (N,) the row of the prompt of each."""


@runtime_checkable
class Filed(Protocol):
    """A source that keeps files beside the checkpoints, for what is too much for each of these."""

    def open(self, folder: Path, step: int, identity: Mapping[str, Any]) -> None:
        """Takes back what was on disk when the checkpoint of `step` was written, and will write there.

        Args:
            folder: the source's own.
            step: the last training step that is done.
            identity: what the base policy's answers depend on, as JSON: network, weights, noise levels, precision.

        Raises:
            CheckpointError: if a file is damaged or of something else.
        """

    def write(self, step: int) -> None:
        """Puts what was measured up to a training step on disk; nothing if no folder was opened."""


@runtime_checkable
class Reward(Protocol):
    """Scores images against prompts."""

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """(N, [F,] 3, h, w) in [0, 1] and N prompts -> (N,) float32, higher is better.

        With frames only if its spec's `media` says so. Images of one prompt have equal prompts; a prompt's `metadata`
        is what its file says beside the text, its `images` are the files that it names.
        """


@runtime_checkable
class Curriculum(Protocol):
    """Chooses the prompts of a training step from the whole list."""

    def candidates(self, steps: int) -> IntArray:
        """The prompts that so many training steps may ask, by index: they are encoded before the first."""

    def choose(self, known: Signals, count: int, rng: np.random.Generator) -> IntArray:
        """What is known of the whole list before a training step -> (count,) indices.

        A pure function of `known`, the generator, which is of (seed, step), and its own state. A prompt that comes
        twice makes two groups, as where one pass over the list ends and the next begins.
        """


@runtime_checkable
class Allocator(Protocol):
    """Splits a step's rollout budget over its prompts."""

    def allocate(self, signals: Signals, budget: int, rng: np.random.Generator) -> IntArray:
        """(P,) rollouts per prompt, in all `budget`; each at least 2, or 0: it is not asked this time."""


@runtime_checkable
class TimestepSelector(Protocol):
    """Chooses the denoising steps that explore and learn."""

    def select(self, signals: Signals, rng: np.random.Generator) -> BoolArray:
        """(P, T), True at the chosen steps; at least one a prompt."""


@runtime_checkable
class Merging(Protocol):
    """A selector that joins steps: some are taken at once with those that follow, by one velocity."""

    def merge(self, selected: BoolArray) -> IntArray:
        """(P, T) chosen steps -> (P, T) int64, the level at which each step ends: i + 1 where nothing is joined.

        All steps of a run that is joined end at the same level, and only the first of them may be chosen.
        """


@runtime_checkable
class Tree(Protocol):
    """Turns counts and steps into a plan."""

    def plan(self, counts: IntArray, steps: BoolArray, rng: np.random.Generator) -> RolloutPlan:
        """(P,) rollouts, at least 2 each, and (P, T) chosen steps -> a plan with exactly `counts` leaves a prompt.

        The children of a level are in the order of their parents; any other order is refused. A plan may scale the
        noise of some edges and let some end later than at the next level.
        """


@runtime_checkable
class Sampler(Protocol):
    """The stochastic denoising step."""

    def transition(
        self, latents: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor, scale: Tensor | None = None
    ) -> Gaussian:
        """(B, *x) twice and (B,) twice, all float32 -> the distribution of the next latents.

        `scale`, (B,) float32, multiplies the noise rate, so that drift and noise still belong together; None is 1 and
        all that is ever given unless the plan scales some edge. `sigma_next` need not be the schedule's next level.
        """

    def log_prob(self, gaussian: Gaussian, next_latents: Tensor) -> Tensor:
        """(B,) float32 log-density of `next_latents`, averaged over dimensions, in this sampler's convention."""


@runtime_checkable
class Advantage(Protocol):
    """Turns scores of rollouts into credit of trained edges."""

    def levels(self, plan: RolloutPlan) -> IntArray:
        """Levels, each of 0..T-1, whose predicted clean images are decoded and scored too; none: only the rollouts."""

    def estimate(self, scores: Scores, weights: Tensor, rollouts: Rollouts) -> Tensor:
        """Scores under R rewards and (R,) weights -> (E,) float32, in the order of `rollouts.edges`.

        Where a step is cut into shards, no process has the latents and images of all rollouts: reading them is an error
        that says so. Scores, plan, log-probabilities and the table of edges are there.
        """


class _Learns(Protocol):
    """What both kinds of objective declare."""

    @property
    def scope(self) -> Literal["rows", "groups"]:
        """What the loss of a row depends on: itself, or its whole group, which then is never cut apart."""

    @property
    def needs_base(self) -> bool:
        """True if `loss` reads the base policy."""

    @property
    def needs_old(self) -> bool:
        """True if `loss` reads the velocity or the mean of the policy that sampled, not only its log-probabilities."""

    @property
    def keeps_old(self) -> bool:
        """True if rollouts are sampled by a policy that lags behind the trained one (see `old_decay`)."""

    def old_decay(self, step: int) -> float:
        """In [0, 1]: what the sampling policy keeps of itself after a training step; the rest is the trained one's."""


@runtime_checkable
class Objective(_Learns, Protocol):
    """The loss of trained transitions."""

    @property
    def process(self) -> Literal["reverse"]:
        """It learns from denoising steps, by their log-probabilities."""

    def loss(self, update: Update) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of each transition (B,), before any averaging, and named metrics (B,); the engine weighs and sums."""


@runtime_checkable
class ForwardObjective(_Learns, Protocol):
    """The loss of clean latents that are noised again; any sampler will do, the deterministic one too."""

    @property
    def process(self) -> Literal["forward"]:
        """It learns from the forward process; trained edges are pairs of a rollout and a noise level."""

    @property
    def shares_noise(self) -> bool:
        """True if the rows of a group are noised again with one and the same noise."""

    def loss(self, update: Renoised) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of each row (B,), before any averaging, and named metrics (B,); the engine weighs and sums."""


@runtime_checkable
class Stateful(Protocol):
    """A part with memory: the checkpoint stores what `state_dict` returns.

    A part that is itself a torch module is left out: a scorer's weights are not what the run has learned. Give it to
    a part that wraps it.
    """

    def state_dict(self) -> dict[str, Any]:
        """Tensors and JSON values by name."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` returned."""


@runtime_checkable
class Reporting(Stateful, Protocol):
    """A part with memory that says something about it after every training step."""

    def report(self) -> Mapping[str, float]:
        """Finite numbers by name: metrics have them as `advantage/NAME`, `reward-LABEL/NAME` and the like."""
