"""Specs of the eleven kinds of part, what they find wrong with an experiment, and their registries.

Nothing here imports torch.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, cast

import numpy as np
from pydantic import Field, field_validator

from aegpo.core.footprint import Footprint
from aegpo.core.interfaces import (
    Advantage,
    Allocator,
    Curriculum,
    ForwardObjective,
    Model,
    Objective,
    Reward,
    Sampler,
    SignalSource,
    TimestepSelector,
    Tree,
)
from aegpo.core.problems import Problem
from aegpo.core.records import FloatArray, IntArray, Per, Prompt, RolloutPlan, Signal, StepTable
from aegpo.core.registry import LONGEST_NAME, Spec
from aegpo.core.signals import SignalCost
from aegpo.core.signatures import built

if TYPE_CHECKING:
    import torch

JOINT_BLOCKS = ("joint", "image-image", "image-text", "text-image", "text-text")  # of layers with image and text
OnError = Literal["stop", "drop"]  # what an observer's failure means for a run
ComparedWith = Literal["base", "own"]  # see `RewardSpec.compared_with`
# diffusers' names of the projections of attention, of the image and of the words (Flow-GRPO's list)
ATTENTION_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


class PartSpec(Spec):
    """What specs of the model and of the algorithm share: what they find wrong with the experiment around them.

    The experiment is an `aegpo.Experiment`; an experiment is made of parts, so that it cannot be named here.
    """

    kind: str

    def problems(self, experiment: Any) -> Iterator[str]:
        """What makes this part impossible in the experiment, in words."""
        yield from ()

    def cautions(self, experiment: Any) -> Iterator[str]:
        """What is possible but probably not meant, in words: shown as a warning."""
        yield from ()


class ModelSpec(PartSpec):
    """A text-to-image network."""

    kind: str
    has_captions: ClassVar[bool] = False
    caption_metadata: ClassVar[tuple[str, ...]] = ()  # keys that every caption has, for rewards that need them
    attention_blocks: ClassVar[tuple[str, ...] | None] = None  # whose entropy it has; None: not before it is loaded
    adapter_targets: ClassVar[tuple[str, ...]] = ATTENTION_TARGETS  # module name suffixes LoRA adapts by default
    reads_images: ClassVar[bool] = False  # `encode` opens the images of prompts; if nobody does, that is told at load
    partial_schedule: ClassVar[bool] = False  # noise levels may begin below 1 and end above 0; see rollouts.py
    # what `Model.decode` returns: (B, 3, h, w), or (B, F, 3, h, w)
    media: ClassVar[Literal["image", "video"]] = "image"

    @property
    def dimensions(self) -> int | None:
        """How many numbers a latent has, C x H x W of an image's; None: known once it is loaded."""
        return None

    @property
    def encoding_bytes(self) -> int | None:
        """What one prompt's encoding takes on disk at most; None: none is kept there."""
        return None

    @property
    def base_folder(self) -> Path | None:
        """The folder of the weights, by which a run knows its base again; None: not there yet, or there is none."""
        return None

    @property
    def ships_base(self) -> bool:
        """True if the weights come with the package, so that another version of it may have others."""
        return False

    def build_unread(self, device: torch.device) -> Model:
        """As `build`; where each process reads its part of the weights, those are on torch's meta device (`Unread`)."""
        return self.build(device)

    def footprint(self, experiment: Any) -> Footprint | None:
        """What a run needs in memory, or None where that is not worth a look."""
        return None

    def settled(self, experiment: Any, free: int) -> Self:
        """The same with every choice made that it leaves to the machine, on which `free` bytes are there for a run.

        Asked right before `build`. A choice may change speed and memory, and no result beyond rounding.
        """
        return self

    @abstractmethod
    def build(self, device: torch.device) -> Model:
        """Loads the network onto the device."""

    @abstractmethod
    def sigmas(self, steps: int) -> FloatArray:
        """(steps+1,) noise levels from 1 to 0, strictly falling; what `Model.sigmas` says, with nothing loaded."""

    def captions(self, split: Literal["train", "evaluation"], count: int, seed: int) -> tuple[str | Prompt, ...]:
        """Prompts the model brings along, if it `has_captions`: texts, or prompts with their `caption_metadata`."""
        raise NotImplementedError(f"model {self.kind!r} does not define captions(split, count, seed)")


class RewardSpec(Spec):
    """A scorer of images or videos against prompts."""

    kind: str
    media: ClassVar[Literal["image", "video", "both"]] = "image"  # what it reads; videos are (N, F, 3, h, w)
    particular: ClassVar[bool] = False  # it `refuses` some prompts: those of files are asked about at load
    needs_metadata: ClassVar[tuple[str, ...]] = ()  # keys it reads; a prompt without one is refused before a run
    needs_images: ClassVar[bool] = False  # a prompt without an image is refused before a run
    group_wise: ClassVar[bool] = False  # a score compares the images of one prompt and means nothing for one alone
    # With what such a reward compares a held-out image: the base's from the same noise, pair by pair, or the prompt's
    # other images by the same policy, of which `evaluation.images_per_prompt` has to paint 2 or more.
    compared_with: ClassVar[ComparedWith] = "base"
    name: str | None = Field(
        default=None, max_length=LONGEST_NAME, description="label in metrics and reports; default: the kind"
    )
    weight: float = Field(default=1.0, ge=-1e6, le=1e6, description="factor of this reward in the weighted sum")
    frames: Literal["mean", "first", "min"] | None = Field(
        default=None,
        description="of videos, for a reward that reads images: mean or min of its scores of all frames, or its score "
        "of the first frame alone; null: it is given what the model paints",
    )

    @field_validator("name")
    @classmethod
    def _can_be_shown(cls, name: str | None) -> str | None:
        if name is not None and not name.isprintable():
            raise ValueError(f"{name!r} has letters that no table can show; a label has printable ones alone")
        return name

    @property
    def label(self) -> str:
        """The name metrics and reports use."""
        return self.name or self.kind

    def refuses(self, prompt: Prompt) -> str | None:
        """Why this reward cannot score images of a prompt; None: it can. Asked only if the kind is `particular`."""
        return None

    @property
    def lane(self) -> str:
        """What scoring keeps busy: rewards of different lanes score at the same time. "": the run's own device."""
        return ""

    @property
    def early(self) -> int:
        """How many calls may be under way at once, each about images that are done, while others are still painted.

        0: there is one call, about all images. What scores on the run's own device is asked so in any case.
        """
        return 1

    def build(self, device: torch.device) -> Reward:
        """The scorer; a spec with nothing to load is its own part."""
        return cast(Reward, self)


class SignalSpec(Spec):
    """A source of signals, measured where a chosen part reads one of them."""

    kind: str
    provides: ClassVar[Mapping[str, Per]]  # name of each signal -> what it has a value for
    of_list: ClassVar[bool] = False  # it knows them of the whole list at once, for free: curricula may read them

    def measured(self, denoising_steps: int) -> tuple[int, ...]:
        """The denoising steps of which it knows something, in order; the others are NaN."""
        return tuple(range(denoising_steps))

    def foreseen(self, experiment: Any) -> Mapping[str, Signal]:
        """Signals that are known before a run, so that plans of `aegpo check` need not make them up."""
        return {}

    def cost(self, denoising_steps: int) -> SignalCost:
        """What it spends on one prompt; nothing by default."""
        return SignalCost()

    def problems(self, experiment: Any) -> Iterator[Problem]:
        """What makes it impossible in the experiment, at places of its own fields."""
        yield from ()

    def build(self, experiment: Any) -> SignalSource:
        """The source; a spec with nothing to load is its own part."""
        return cast(SignalSource, self)


class CurriculumSpec(PartSpec):
    """A rule that chooses the prompts of each training step from the whole list."""

    kind: str

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of the signals it reads, of every prompt of the list: their sources must know them for free."""
        return ()

    def build(self, prompts: int, per_step: int, seed: int) -> Curriculum:
        """The curriculum of a list of so many `prompts`, `per_step` of which are asked at once."""
        raise NotImplementedError(f"curriculum {self.kind!r} does not define build(prompts, per_step, seed)")


class AllocatorSpec(PartSpec):
    """A rule that splits a step's rollouts over its prompts."""

    kind: str

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of the signals it reads: their sources are measured in every step, and nothing else is."""
        return ()

    def build(self) -> Allocator:
        """The allocator; a spec with nothing to load is its own part."""
        return cast(Allocator, self)


class SelectorSpec(PartSpec):
    """A rule that chooses the denoising steps that explore and learn."""

    kind: str

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of the signals it reads: their sources are measured in every step, and nothing else is."""
        return ()

    def build(self) -> TimestepSelector:
        """The selector; a spec with nothing to load is its own part."""
        return cast(TimestepSelector, self)


class TreeSpec(PartSpec):
    """A shape of the forest that a step's rollouts form."""

    kind: str

    def build(self) -> Tree:
        """The tree; a spec with nothing to load is its own part."""
        return cast(Tree, self)


class SamplerSpec(PartSpec):
    """A stochastic denoising step."""

    kind: str

    @property
    def gaussian(self) -> bool:
        """False if `log_prob` is no Gaussian log-density, so that clip ranges of others do not fit."""
        return True

    def table(self, sigmas: FloatArray) -> StepTable:  # (T+1,)
        """The coefficients of every step of a schedule."""
        return self.table_between(sigmas[:-1], sigmas[1:])

    def table_between(self, sigma: FloatArray, sigma_next: FloatArray, scale: FloatArray | None = None) -> StepTable:
        """The coefficients of K steps; found by trying, for steps that are affine in x and v.

        Args:
            sigma: (K,) where each begins.
            sigma_next: (K,) where each ends.
            scale: (K,) factors of the noise rate; None: 1, and never anything else unless a plan scales noise.
        """
        import torch

        sampler = built("sampler", self.kind, self.build, Sampler)
        levels = tuple(torch.from_numpy(each).float() for each in (sigma, sigma_next, scale) if each is not None)
        zero, one = torch.zeros(len(sigma), 1, 1, 1), torch.ones(len(sigma), 1, 1, 1)
        step = sampler.transition(one, zero, *levels)
        found = (step.mean.flatten(), sampler.transition(zero, one, *levels).mean.flatten(), step.std)
        return StepTable(*(values.double().numpy() for values in found))

    def build(self) -> Sampler:
        """The sampler; a spec with nothing to load is its own part."""
        return cast(Sampler, self)


class AdvantageSpec(PartSpec):
    """A rule that turns scores of rollouts into credit of trained edges."""

    kind: str

    def levels(self, plan: RolloutPlan) -> IntArray:
        """Levels whose predicted clean images are scored too, as `Advantage.levels`; none."""
        return np.zeros(0, dtype=np.int64)

    def build(self) -> Advantage:
        """The advantage; a spec with nothing to load is its own part."""
        return cast(Advantage, self)


class ObjectiveSpec(PartSpec):
    """A loss of trained transitions, or of clean latents noised again."""

    kind: str
    process: ClassVar[Literal["reverse", "forward"]] = "reverse"
    scope: ClassVar[Literal["rows", "groups"]] = "rows"  # groups: the loss compares the edges of a prompt at a level
    needs_old: ClassVar[bool] = False  # the loss reads the velocity or mean of the policy that sampled
    keeps_old: ClassVar[bool] = False  # rollouts are sampled by a policy that lags behind

    @property
    def needs_base(self) -> bool:
        """True if the loss reads the base policy."""
        return False

    @property
    def shares_noise(self) -> bool:
        """True if all rollouts of a prompt get the same noise at a level; read only in the forward process."""
        return False

    def old_decay(self, step: int) -> float:
        """In [0, 1]: what the sampling policy keeps of itself after a training step; read only if `keeps_old`."""
        return 0.0

    def build(self) -> Objective | ForwardObjective:
        """The objective; a spec with nothing to load is its own part."""
        return cast(Objective | ForwardObjective, self)


class TrackerSpec(Spec):
    """An observer that records or shows a run."""

    kind: str
    on_error: OnError = Field(default="stop", description="if it fails: stop the run, whose state is saved, or drop it")

    @abstractmethod
    def build(self, folder: Path) -> object:
        """An object with any of the observer hooks; `folder` is the run's own."""
