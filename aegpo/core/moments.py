"""The two moments of AdamW: what they take in memory, and what they need installed."""

from __future__ import annotations

import importlib.util
import math

MOMENTS = 2  # of AdamW: the running means of the gradient and of its square
FLOAT32 = 4
# of bitsandbytes' AdamW8bit: smaller tensors stay float32, and a block shares a scale for each of its moments
LEAST_8BIT, BLOCK = 4096, 256


def moment_bytes(numbers: int, moments: str) -> int:
    """Bytes of both moments of a weight of so many numbers."""
    if moments == "8bit" and numbers >= LEAST_8BIT:
        return MOMENTS * (numbers + FLOAT32 * math.ceil(numbers / BLOCK))
    return MOMENTS * FLOAT32 * numbers


def missing_package(moments: str) -> str | None:
    """What to install for such moments; None if nothing is missing. Imports nothing."""
    if moments != "8bit" or importlib.util.find_spec("bitsandbytes") is not None:
        return None
    return (
        "'8bit' needs the package bitsandbytes, which is not installed; install it with  "
        'pip install "aegpo[bitsandbytes]"  or choose float32'
    )
