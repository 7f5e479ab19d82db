"""Noise by key: what a node is given depends on its place alone, not on who draws it, in which order, or what else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from aegpo.core.records import IntArray, Prompt
from aegpo.prompts.images import identity

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


class StepNoise:
    """All noise of a training step's rollouts: by seed and step, and the level and the node of the whole plan."""

    def __init__(self, seed: int, step: int = 0) -> None:
        self._start, self._levels = KeyedNoise(seed, step, "start"), KeyedNoise(seed, step, "level")
        self._renoise = KeyedNoise(seed, step, "renoise")

    def start(self, roots: IntArray, shape: tuple[int, ...]) -> Tensor:  # (n, *shape)
        """Start noise by its number in the plan; equal numbers share theirs."""
        return self._start.of(0, roots, shape)

    def level(self, level: int, nodes: IntArray, shape: tuple[int, ...]) -> Tensor:  # (n, *shape)
        """Noise of the steps from a level to nodes of the next."""
        return self._levels.of(level, nodes, shape)

    def again(self, levels: IntArray, owners: IntArray, shape: tuple[int, ...]) -> Tensor:  # (E, *shape)
        """Noise for clean latents at (E,) rising levels, by the number of the rollout, or prompt, that has it."""
        cuts = np.flatnonzero(np.diff(levels)) + 1
        pairs = zip(np.split(levels, cuts), np.split(owners, cuts), strict=True)
        return torch.cat([self._renoise.of(int(level[0]), owner, shape) for level, owner in pairs if len(level)])


def prompt_noise(
    shape: tuple[int, ...], seed: int, prompts: Sequence[Prompt], purpose: Literal["signal", "evaluation"], sample: int
) -> Tensor:  # (P, *shape) float32, on the CPU
    """Start noise that belongs to prompts: by what they ask, the how-manieth of its list asks it, and the sample.

    So it does not depend on where in a list a prompt stands, nor on what else is asked.
    """
    keys = [(KeyedNoise(seed, _number(prompt), purpose), np.array([prompt.occurrence])) for prompt in prompts]
    return torch.cat([noise.of(sample, occurrence, shape) for noise, occurrence in keys])


def _number(prompt: Prompt) -> int:
    """64 bits of what a prompt asks for: its text, and the contents of its images."""
    return int.from_bytes(hashlib.sha256(json.dumps(identity(prompt)).encode()).digest()[:8], "big")
