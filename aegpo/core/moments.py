"""The moments that optimizers keep: what they take in memory, and what they need installed."""

from __future__ import annotations

import importlib.util
import math

FLOAT32 = 4
# of bitsandbytes' 8-bit optimizers: smaller tensors stay float32, and a block shares a scale for each of its moments
LEAST_8BIT, BLOCK = 4096, 256


def moment_bytes(numbers: int, moments: str, count: int = 2) -> int:
    """Bytes of the `count` moments of a weight of so many numbers; Adam has two, of the gradient and of its square."""
    if moments == "8bit" and numbers >= LEAST_8BIT:
        return count * (numbers + FLOAT32 * math.ceil(numbers / BLOCK))
    return count * FLOAT32 * numbers


def missing_package(moments: str) -> str | None:
    """What to install for such moments; None if nothing is missing. Imports nothing."""
    if moments != "8bit" or importlib.util.find_spec("bitsandbytes") is not None:
        return None
    return (
        "'8bit' needs the package bitsandbytes, which is not installed; install it with  "
        'pip install "aegpo[bitsandbytes]"  or choose float32'
    )
