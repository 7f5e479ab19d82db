"""What a side is told to do, and what it says of a training step."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PROMPTS = ("four red circles above the blue square", "a green cube left of two purple circles")
STEPS = 10  # T
NOISE, ETA = 0.7, 0.3  # of Flow-SDE (Flow-GRPO) and of Dance-SDE (DanceGRPO)
LEARNING_RATE, WEIGHT_DECAY, MOST_GRADIENT = 1e-5, 1e-4, 1.0
CLIP, MOST_ADVANTAGE = 1e-4, 5.0
GUIDANCE = 3.5  # what FLUX's embedding is told
FIRST = "first.pt"  # what a rival sampled and learned first


@dataclass(frozen=True)
class Case:
    """One side of one comparison."""

    checkout: Path  # of the rival
    model: Path  # a pipeline, see models.py
    shared: Path  # folder of both sides
    folder: Path  # of this side, where it works
    device: str
    group: int  # rollouts of each of the two prompts
    updates: int  # of the optimizer in a training step
    retain: str | None = None  # of aegpo's optimizer; None: as it is

    @property
    def rollouts(self) -> int:
        """N."""
        return self.group * len(PROMPTS)

    @property
    def per_update(self) -> int:
        """Rollouts of an optimizer update."""
        return self.rollouts // self.updates

    @property
    def prompt_file(self) -> Path:
        """The prompts, one a line."""
        return self.shared / "train.txt"


@dataclass(frozen=True)
class Turn:
    """One training step."""

    processor: float  # seconds, of all threads
    wall: float  # seconds
    rows: int  # that the network was evaluated on without gradient
    learning_rows: int  # with gradient
    said: dict[str, Any] = field(default_factory=dict)  # what else is known
