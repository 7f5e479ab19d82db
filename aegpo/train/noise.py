"""Noise by key: what a node is given depends on its place alone, not on who draws it, in which order, or what else."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from aegpo.core.records import IntArray

Purpose = Literal["start", "level", "renoise", "signal", "evaluation"]
# Part of every key, so that they never change; a new purpose gets a new number.
_NUMBERS: dict[Purpose, int] = {"start": 1, "level": 2, "renoise": 3, "signal": 4, "evaluation": 5}


class KeyedNoise:
    """Standard normal noise of one purpose in one training step.

    Philox4x64-10 (Salmon et al. 2011, as numpy has it) makes block b of a node's bits from its key and counter alone:
    key (seed, step), counter (b, node, level, purpose). Each node has 2^64 blocks of its own, so that no two share any.
    The bits become normals as in numpy's `Generator.standard_normal`, float32. What has no step or no level takes 0; a
    node may be any number, such as that of a prompt.

    One bit generator is moved from node to node: making one for each costs more than the noise of small latents.
    """

    def __init__(self, seed: int, step: int, purpose: Purpose) -> None:
        """`seed`: in [0, 2^64), as is `step`."""
        self._bits = np.random.Philox(key=np.array([seed, step], dtype=np.uint64))
        self._draw = np.random.Generator(self._bits).standard_normal
        self._place = self._bits.state  # a copy, before anything is drawn
        self._counter = self._place["state"]["counter"]
        self._counter[3] = _NUMBERS[purpose]

    def of(self, level: int, nodes: IntArray, shape: tuple[int, ...]) -> Tensor:  # (n, *shape) float32, on the CPU
        """Noise of (n,) nodes of a level; equal nodes have equal noise."""
        noise = np.empty((len(nodes), *shape), dtype=np.float32)
        self._counter[2] = level
        for row, node in zip(noise, nodes.tolist(), strict=True):
            self._counter[1] = node
            self._bits.state = self._place
            self._draw(dtype=np.float32, out=row)
        return torch.from_numpy(noise)
