"""Images by which a reward is tried: one that it should score high, and one that it should not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from aegpo.core.records import FloatArray, Prompt


@dataclass(frozen=True)
class Examples:
    """Images of one prompt; `aegpo check --rewards` and `aegpo.testing.check_reward` want the first scored higher.

    Of a reward that compares the images of a prompt (`group_wise`), both are groups of n images; with
    `compared_with: base` both are scored as one group.
    """

    prompt: Prompt  # with the metadata that the reward needs
    high: FloatArray  # (n, [F,] 3, h, w) in [0, 1]; n is 1 for rewards of single images
    low: FloatArray  # the same shape


@runtime_checkable
class Exemplary(Protocol):
    """A `RewardSpec` that knows such images; offering them is optional."""

    def examples(self) -> Examples:
        """Images whose order no setting of the spec changes."""
        ...
