"""The sections of an experiment that choose no part: prompts, rollouts, policy, optimizer, checkpoints."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from aegpo.core.addresses import has_user
from aegpo.core.moments import missing_package
from aegpo.core.places import LocalOrHub
from aegpo.core.problems import Problem
from aegpo.core.rates import ScheduleSpec
from aegpo.core.registry import Spec, Where, expand_shorthand

if TYPE_CHECKING:
    from aegpo.core.interfaces import ForwardObjective, Objective
    from aegpo.core.parts import ObjectiveSpec

GIB = 2**30
# Counts end where nothing is meant any more and arithmetic of 64 bits is still far from its end.
Positive = Annotated[int, Field(ge=1, le=1_000_000)]
NotNegative = Annotated[int, Field(ge=0, le=1_000_000)]
MOST_SEED = 2**63 - 1  # torch takes no more; and keyed noise takes none below 0
Seed = Annotated[int, Field(ge=0, le=MOST_SEED)]
MicroBatch = Literal["auto"] | Positive
UNTIL_FOUND = 64  # what `micro_batch: auto` stands for where nothing is computed, as in `check`
Decay = Annotated[float, Field(ge=0, lt=1)]
Split = Literal["train", "evaluation"]  # the lists of prompts


def _one_line(given: str) -> str:
    if not given.strip():
        raise ValueError("must say something, not nothing; or leave it out")
    if len(given.splitlines()) > 1 or given != given.strip():
        raise ValueError("must be one line without spaces around it; a longer sentence goes on under '>-'")
    return given


Sentence = Annotated[str, Field(max_length=300), AfterValidator(_one_line)]


class DatasetPrompts(Spec):
    """Prompts of a dataset on the Hugging Face hub or in a folder, through `datasets`."""

    dataset: LocalOrHub = Field(description="hub id such as org/name, or a folder that `datasets` can load")
    file: str | None = Field(
        default=None, description="one file of the dataset, such as train.json; null: all of the split"
    )
    split: str = Field(default="train", description="the split; with `file`, what `datasets` calls it: train")
    column: str = Field(default="prompt", description="the column with the prompts; one that occurs again counts once")
    revision: str | None = Field(default=None, description="branch, tag or commit of a hub id; null: the main branch")

    @field_validator("dataset", "file")
    @classmethod
    def _names_no_user(cls, place: str | None) -> str | None:
        if place is not None and has_user(place):
            raise ValueError(
                "an address with a user or password is refused, since it would be recorded in the manifest; download "
                "the file and give its path"
            )
        return place

    @property
    def label(self) -> str:
        """How messages call it."""
        return f"dataset {self.dataset!r}" + (f" ({self.file})" if self.file else "")


class PromptsSpec(Spec):
    """Where prompts come from: the model's own captions, files, or datasets."""

    file: Path | None = Field(
        default=None,
        description="one file for both lists, in place of `train` and `evaluation`: of its different prompts "
        "`evaluation_count` are held out, those with the lowest SHA-256 of `seed` and prompt (our choice), and the "
        "others are trained on",
    )
    train: Path | DatasetPrompts | None = Field(
        default=None,
        description="file, relative to this one: .txt one a line, .jsonl, .ndjson or .json with the key `prompt`, "
        ".csv, .tsv or .parquet with that column, and `image` or `images` for files beside it; or a dataset; default: "
        "the model's captions",
    )
    evaluation: Path | DatasetPrompts | None = Field(
        default=None, description="file or dataset of held-out prompts; default: the model's captions"
    )
    train_count: Positive = Field(
        default=512, description="training prompts drawn from the model's captions or read at most"
    )
    evaluation_count: Positive = Field(
        default=64,
        description="held-out prompts drawn from the model's captions or read at most; of `file`: exactly so many",
    )
    shared: Literal["refuse", "drop"] = Field(
        default="refuse",
        description="held-out prompts that occur in training too: refuse to run, or drop them from training",
    )
    seed: Seed = Field(
        default=0,
        description="which captions are drawn, and which prompts of `file` held out; the same for every arm and seed",
    )

    @model_validator(mode="after")
    def _has_one_source(self) -> Self:
        other = next((name for name in ("train", "evaluation") if self.file and dict(self)[name] is not None), None)
        if other is not None:
            raise ValueError(
                f"'file' is for both lists, so it goes with no {other!r}; leave one out ('{other}: null' or 'file: "
                "null', where it is inherited)"
            )
        return self

    def source(self, split: Split) -> Path | DatasetPrompts | None:
        """The file or dataset of a list; None: the model's captions."""
        return self.file or (self.train if split == "train" else self.evaluation)


class TailSpec(Spec):
    """How a trajectory ends after its last noisy step (MixGRPO-Flash: DPM-Solver++, of order 2, in fewer steps).

    Of T steps the last noisy or trained one is number n: max(1, int((T - n) ratio) - 1) steps follow instead of
    T - n - 1, as in the published code. Deviations: they are spaced evenly in the run's schedule, by linear
    interpolation (published: in time, shifted again), and a single step ends at the image (published: short of it).
    """

    solver: Literal["euler", "dpm"] = Field(default="dpm", description="DPM-Solver++ multistep of order 2, or Euler")
    ratio: float = Field(
        default=0.4, gt=0, le=1, description="share of the steps (MixGRPO-Flash: 0.4, Flash*: 0.2); 1: all"
    )


class RolloutsSpec(Spec):
    """How many trajectories a training step samples, and of which length."""

    prompts_per_step: Positive = Field(default=8, description="P: prompts in a training step")
    rollouts_per_step: int = Field(default=96, ge=2, le=65536, description="N: rollouts of a step over all its prompts")
    denoising_steps: int = Field(
        default=10, ge=2, le=1000, description="T: denoising steps of a trajectory, in training"
    )
    micro_batch: MicroBatch = Field(
        default=64,
        description="latents a velocity call takes at most while sampling; auto: found when the run starts, as the "
        "fewest that are nearly as fast as any number that memory holds, and noted for later starts",
    )
    storage: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32",
        description="dtype trajectories are kept in; log-probabilities are computed on the stored value",
    )
    decode: Literal["final", "predicted-clean"] = Field(
        default="final",
        description="what becomes an image: the last state, with the last step's noise if it had any, or what the last "
        "step's velocity predicts without noise, x - sigma v (DanceGRPO and BranchGRPO)",
    )
    tail: TailSpec | None = Field(default=None, description="solver and number of the steps after the last noisy one")

    @property
    def latents_at_once(self) -> int:
        """`micro_batch` as a number."""
        return UNTIL_FOUND if self.micro_batch == "auto" else self.micro_batch


class ParallelSpec(Spec):
    """One run over several processes; may change between starts of a run, as `micro_batch` may."""

    read_where: ClassVar[Mapping[str, Where]] = dict.fromkeys(
        ("gather", "replicas"), Where("weights", ("auto", "sharded"))
    )

    shards: Annotated[int, Field(ge=1, le=65536)] | None = Field(
        default=None,
        description="parts a training step is cut into, shared out among the processes. With as many shards, one kind "
        "of processor and one number of threads, any number of processes that is a power of two and divides them has "
        "the same results, to the bit; null: the number of processes of the first start, so another number later "
        "moves results by rounding",
    )
    timeout_minutes: float = Field(
        default=60.0,
        gt=0,
        le=100_000,
        description="how long a process waits for another before it gives up and says for whom; longer than the "
        "slowest step of one process, its rewards included",
    )
    weights: Literal["auto", "whole", "sharded"] = Field(
        default="auto",
        description="where the trained network and its frozen base are: whole on every process, or a part of each on "
        "every process (fully_shard); auto: sharded where a run of several processes would not fit whole",
    )
    gather: Literal["sampling", "never"] = Field(
        default="sampling",
        description="of sharded weights: sampling: every process has all of them while images are painted, and nobody "
        "waits for anybody there; never: block by block, in lockstep, which needs the least memory",
    )
    replicas: int = Field(
        default=1,
        ge=1,
        le=65536,
        description="of sharded weights: how many times all of them are there, as on every machine of several; it "
        "divides the number of processes",
    )


class PolicySpec(Spec):
    """What is trained: every weight, or low-rank adapters (then the base policy is the network without them)."""

    read_where: ClassVar[Mapping[str, Where]] = dict.fromkeys(("rank", "alpha", "targets"), Where("train", ("lora",)))

    train: Literal["full", "lora"] = Field(default="full", description="full fine-tuning, or LoRA through peft")
    rank: int = Field(default=32, ge=1, le=4096, description="LoRA rank")
    alpha: Positive = Field(default=64, description="LoRA alpha; the adapter's scale is alpha / rank")
    targets: Annotated[tuple[str, ...], Field(min_length=1)] | None = Field(
        default=None,
        description="module name suffixes that get an adapter, each of some module; null: the model's own list, as "
        "published",
    )
    init: Literal["gaussian", "default"] = Field(
        default="gaussian",
        description="how a LoRA begins, its second matrix at 0 in either; the first one is, in peft's words, gaussian: "
        "normal with std 1 / rank (Flow-GRPO), or default: Kaiming's uniform, as in the LoRA paper's code (DanceGRPO)",
    )
    ema: float | None = Field(
        default=None, gt=0, lt=1, description="decay per optimizer step of averaged weights; null: none"
    )


class OptimizerSpec(Spec):
    """The optimizer, its learning rate, and how a step's transitions are dealt out to it."""

    read_where: ClassVar[Mapping[str, Where]] = {
        **dict.fromkeys(("betas", "epsilon"), Where("kind", ("adamw", "adam"))),
        "momentum": Where("kind", ("sgd",)),
    }

    kind: Literal["adamw", "adam", "sgd"] = Field(
        default="adamw",
        description="adamw: decoupled weight decay (arXiv 1711.05101; Flow-GRPO). adam: the decay is added to the "
        "gradient (arXiv 1412.6980, as torch has it). sgd: that too, with `momentum`",
    )
    learning_rate: float = Field(default=3e-4, gt=0, le=1000, description="the schedule's peak (Flow-GRPO, LoRA: 3e-4)")
    schedule: Annotated[ScheduleSpec, BeforeValidator(expand_shorthand)] = Field(
        default=ScheduleSpec(),
        description="the learning rate over the run's updates; a bare name is short for {kind: name}",
    )
    betas: tuple[Decay, Decay] = Field(
        default=(0.9, 0.999), description="adamw, adam: decay of the gradient's two moments"
    )
    epsilon: float = Field(
        default=1e-8, ge=1e-30, le=1, description="adamw, adam: added to the root of the second moment, in float32"
    )
    momentum: Decay = Field(
        default=0.9,
        description="sgd: decay of the gradients' sum that is stepped along (He et al., arXiv 1512.03385: 0.9)",
    )
    weight_decay: float = Field(
        default=1e-4,
        ge=0,
        le=1000,
        description="adamw: share of a weight taken off, per step and learning rate (Flow-GRPO: 1e-4); adam, sgd: so "
        "many times the weight are added to its gradient",
    )
    moments: Literal["float32", "8bit"] = Field(
        default="float32",
        description="how adamw and adam keep the gradient's two moments: 8 bytes a weight, or 2 with bitsandbytes' "
        "blockwise quantisation (arXiv 2110.02861; tensors of fewer than 4096 weights stay float32)",
    )
    max_grad_norm: float | None = Field(
        default=1.0, gt=0, le=1e9, description="gradients are scaled down to this norm; null: never"
    )
    rollouts_per_update: Positive | None = Field(
        default=None, description="rollouts whose edges make one optimizer step; null: all of the training step's"
    )
    deal: Literal["rollouts", "prompts"] = Field(
        default="rollouts",
        description="what is dealt to optimizer steps: rollouts, `rollouts_per_update` to each; or whole prompts, "
        "those with more rollouts first, each to the step with the fewest so far (`rollouts_per_update`: the mean)",
    )
    inner_epochs: Positive = Field(default=1, description="passes over a training step's transitions")
    micro_batch: MicroBatch = Field(
        default=64,
        description="states a forward-backward takes at most, with all transitions from them; never changes results "
        "beyond rounding. An objective that compares the rollouts of a prompt takes them together, however many they "
        "are. auto: found as that of rollouts is",
    )
    retain: Literal["auto", "never"] | Annotated[float, Field(gt=0, le=1e6)] = Field(
        default="auto",
        description="memory for what the network computed while sampling: the first optimizer step of a training step "
        "then learns from it without evaluating those states again. auto: half of what is free; a number: so many "
        "GiB; never: every state is evaluated again. Where it ends the rest is evaluated again, with the same results",
    )
    reduction: Literal["prompt", "rollout", "edge"] = Field(
        default="prompt",
        description="every prompt, every rollout or every trained edge has the same weight in the loss (our choice: "
        "prompt; BranchGRPO: edge, so that shared steps near a tree's root weigh less than late ones)",
    )
    drop_zero_credit: bool = Field(
        default=False,
        description="edges without any credit are left out of the update and of its average (Flow-GRPO's SD3 code); "
        "they have no policy gradient, so this saves time and raises the weight of the others. An objective that "
        "compares the rollouts of a prompt loses only whole groups",
    )

    @property
    def states_at_once(self) -> int:
        """`micro_batch` as a number."""
        return UNTIL_FOUND if self.micro_batch == "auto" else self.micro_batch

    @property
    def num_moments(self) -> int:
        """Running means that are kept of each weight's gradient."""
        return int(self.momentum > 0) if self.kind == "sgd" else 2

    def retains(self, objective: ObjectiveSpec | Objective | ForwardObjective) -> bool:
        """True if the first optimizer step of a training step may learn from what sampling computed."""
        own = objective.process == "reverse" and not objective.keeps_old  # states of the policy that is trained
        return self.retain != "never" and own and objective.scope == "rows"

    def updates(self, rollouts: int) -> int:
        """Optimizer updates in a training step of so many rollouts, at most: one without any edge is left out."""
        return self.inner_epochs * math.ceil(rollouts / (self.rollouts_per_update or rollouts))

    def problems(self, updates: int) -> Iterator[Problem]:
        """What does not go together, in a run of at most `updates`."""
        if self.kind == "sgd" and self.moments == "8bit":
            message = "'8bit' is for the two moments of adamw and adam; use float32, or one of these as 'kind'"
            yield Problem(("optimizer", "moments"), message)
        elif (missing := missing_package(self.moments)) is not None:
            yield Problem(("optimizer", "moments"), missing)
        yield from self.schedule.problems(updates)


class CheckpointSpec(Spec):
    """When the state of a run is written."""

    every: Positive = Field(default=10, description="training steps between checkpoints; the last step always counts")
    keep: Positive = Field(default=2, description="newest checkpoints kept")
