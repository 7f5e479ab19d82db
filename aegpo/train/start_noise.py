"""Start noise that belongs to something: to a prompt whose signals are measured, or to a number that is painted."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_SEEDS = 1_000_003  # keeps the start noises of prompts apart under neighbouring seeds
_NUMBERED = 4243  # keeps the start noise of numbered prompts apart from other streams of the same seed


def signal_noise(shape: tuple[int, ...], seed: int, prompt: int, sample: int = 0) -> Tensor:  # x
    """The start noise of one sample of a prompt, by the prompt's index."""
    own = seed * _SEEDS + prompt
    if sample > 0:  # the CPU's generator reads 32 bits of a seed, so that samples cannot just be far apart
        own = int(np.random.SeedSequence((own % 2**64, sample)).generate_state(1)[0])
    return torch.randn(shape, generator=torch.Generator().manual_seed(own))


def numbered_noise(shape: tuple[int, ...], seed: int, number: int) -> Tensor:  # x
    """The start noise of a number."""
    own = int(np.random.SeedSequence((_NUMBERED, seed, number)).generate_state(1)[0])
    return torch.randn(shape, generator=torch.Generator().manual_seed(own))
