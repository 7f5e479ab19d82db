"""What observers of a run are told: the run, its steps, its evaluations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from aegpo.core.records import BoolArray, FloatArray, IntArray, Prompt, Signal

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Evaluation:
    """Scores of held-out prompts under the deterministic sampler, and a few of the images."""

    prompts: tuple[str, ...]
    scores: Mapping[str, FloatArray]  # reward label -> (prompts,), means over the images of each
    base_scores: Mapping[str, FloatArray]  # the same for the untouched base policy
    images: Tensor  # (k, [F,] 3, h, w) in [0, 1]: the first of each of k prompts, the same noise every time
    seconds: float = 0.0  # wall-clock; everything else is deterministic


@dataclass(frozen=True)
class StepReport:
    """What one training step did. Everything but `seconds` is deterministic."""

    step: int
    metrics: Mapping[str, float]
    prompts: tuple[Prompt, ...]  # P
    counts: IntArray  # (P,) rollouts per prompt
    selected: BoolArray  # (P, T)
    signals: Mapping[str, Signal]  # that sources measured, by name; none where no part reads any
    seconds: Mapping[str, float]  # stage -> wall-clock
    unrecorded: Mapping[str, float] = field(default_factory=dict)  # more metrics, which the run's record leaves out


@dataclass(frozen=True)
class RunInfo:
    """What an observer needs to know about the run it watches."""

    arm: str
    seed: int
    folder: Path  # the run's own: NAME/ARM/seed-S
    first_step: int  # steps already done: 0, or the step of the checkpoint a resumed run starts from
    training_steps: int
    evaluated_steps: tuple[int, ...] = (0,)  # after which the held-out prompts are scored; 0: before training
    owes_evaluation: bool = False  # that of `first_step` is still to come
