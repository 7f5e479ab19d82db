"""Measures every block of every layer at every denoising step of some prompts' deterministic trajectories."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from aegpo.attention.entropy import Block, attention_entropy, blocks_of, measure_call
from aegpo.core.records import AttentionCall, Conditioning, FloatArray, Prompt
from aegpo.errors import AegpoError
from aegpo.method.samplers import euler, final_latents, start_latents
from aegpo.method.signals.entropy_probe import nothing_measured, without_layer
from aegpo.train.execution import Execution
from aegpo.train.noise import prompt_noise

MAPS = 6  # prompts whose entropies are kept token by token


@dataclass(frozen=True)
class Values:
    """One block over all prompts, steps and layers; NaN where a layer does not have the block."""

    entropy: FloatArray  # (P, T, layers) nats, mean over heads and rows
    standard_error: FloatArray  # (P, T, layers) nats, of drawing rows; 0 if all were measured
    mass: FloatArray  # (P, T, layers) in [0, 1], what the rows give to the block's keys
    valid_keys: FloatArray  # (P, T, layers) keys that are not padding

    @property
    def curves(self) -> FloatArray:  # (P, T)
        """Entropy(t) of each prompt, mean over layers."""
        mean: FloatArray = np.nanmean(self.entropy, axis=2)
        return mean


@dataclass(frozen=True)
class Profile:
    """One policy on some prompts."""

    layers: tuple[str, ...]
    kinds: tuple[str, ...]  # of the layers
    blocks: Mapping[str, Values]
    maps: FloatArray | None  # (MAPS or fewer, T, rows, columns) nats of the image tokens, mean over heads and layers
    images: FloatArray  # (MAPS or fewer, [F,] 3, h, w) in [0, 1], where these trajectories end

    def curves(self, block: str) -> FloatArray:  # (P, T)
        """Entropy(t) of each prompt in a block.

        Raises:
            AegpoError: if no layer has the block.
        """
        if block not in self.blocks:
            raise AegpoError(nothing_measured(block, ("*",), dict(zip(self.layers, self.kinds, strict=True))))
        return self.blocks[block].curves


@torch.no_grad()
def measure_profile(
    how: Execution,
    prompts: Sequence[Prompt],
    seed: int,
    layers: Sequence[str] = ("*",),
    rows: int | Literal["all"] = "all",
) -> Profile:
    """Follows each prompt from the probe's start noise to its image and measures all attention on the way.

    Args:
        how: model, sampler's noise levels and precision; inside of `model.frozen("base")` the base is measured.
        prompts: by their place, from 0, as the probe numbers training prompts.
        seed: of start noise and of the draw of rows.
        layers: patterns of layer names.
        rows: query rows measured in each call.

    Raises:
        AegpoError: if no softmax attention can be seen, or no layer matches.
    """
    records: list[_Record] = []
    images: list[Tensor] = []
    for first in range(0, len(prompts), how.micro_batch):
        part = prompts[first : first + how.micro_batch]
        noise = prompt_noise(how.model.latent_shape, seed, part, "signal", 0)
        latents = start_latents(noise.to(how.sigmas.device), how.sigmas)
        mapped = max(0, MAPS - first) if len(how.model.latent_shape) == 3 else 0
        record = _Record(layers, rows, seed, maps=mapped)
        latents = final_latents(_follow(how, latents, how.model.encode(part), record), how.sigmas)
        records.append(record)
        images.append(how.model.decode(latents[: max(0, MAPS - first)]))
    return _joined(records, torch.cat(images), how.model.latent_shape)


def _follow(how: Execution, latents: Tensor, cond: Conditioning, record: _Record) -> Tensor:
    for sigma, sigma_next in zip(how.sigmas[:-1], how.sigmas[1:], strict=True):
        before, after = sigma.expand(len(latents)), sigma_next.expand(len(latents))
        record.next_step()
        with how.model.tap_attention(record.see):
            velocity = how.velocity(latents, before, cond)
        latents = euler(latents, velocity, before, after).to(how.storage).float()
    return latents


class _Record:
    """Sees the attention of a batch of trajectories and keeps what is measured, step by step."""

    def __init__(self, patterns: Sequence[str], rows: int | Literal["all"], seed: int, maps: int) -> None:
        self.patterns, self._rows, self._seed, self._maps = patterns, rows, seed, maps
        self.kinds: dict[str, str] = {}  # of every layer that was seen
        self.steps: list[dict[tuple[str, str], list[FloatArray]]] = []  # (layer, block) -> (4, B) for each call
        self.maps: list[dict[str, list[Tensor]]] = []  # layer -> (K, image tokens) for each call

    def next_step(self) -> None:
        """What is seen from now on belongs to the next denoising step."""
        self.steps.append({})
        self.maps.append({})

    def see(self, call: AttentionCall) -> None:
        """Measures a call of a chosen layer."""
        self.kinds[call.layer] = call.kind
        if not any(fnmatchcase(call.layer, pattern) for pattern in self.patterns):
            return
        blocks = cast("Sequence[Block]", blocks_of(call))
        for block, found in measure_call(call, blocks, rows=self._rows, seed=self._seed).items():
            mass = torch.ones_like(found.entropy) if found.mass is None else found.mass
            error = found.standard_error.square().mean(dim=1).sqrt()
            means = (found.entropy.mean(dim=1), error, mass.mean(dim=1), found.valid_keys)
            values = np.stack([each.double().cpu().numpy() for each in means])
            self.steps[-1].setdefault((call.layer, block), []).append(values)
        if self._maps and call.kind != "cross" and call.image.stop > call.image.start:
            some = slice(0, self._maps)
            mask = call.mask if call.mask is None or call.mask.shape[0] == 1 else call.mask[some]
            tokens = torch.arange(call.query.shape[2], device=call.query.device)[call.image]
            each = attention_entropy(call.query[some], call.key[some], scale=call.scale, mask=mask, rows=tokens)
            self.maps[-1].setdefault(call.layer, []).append(each.mean(dim=1).cpu())


def _joined(records: Sequence[_Record], images: Tensor, latent_shape: tuple[int, ...]) -> Profile:
    seen = records[0].kinds
    chosen = [layer for layer in seen if any(layer == key for key, _ in records[0].steps[0])]
    if idle := without_layer(records[0].patterns, chosen):
        raise AegpoError(nothing_measured("joint", idle, seen))
    blocks = dict.fromkeys(block for step in records[0].steps for _, block in step)
    return Profile(
        layers=tuple(chosen),
        kinds=tuple(seen[layer] for layer in chosen),
        blocks={block: _values(records, chosen, block) for block in blocks},
        maps=_maps(records, latent_shape),
        images=images.double().cpu().numpy(),
    )


def _values(records: Sequence[_Record], layers: Sequence[str], block: str) -> Values:
    def cell(step: Mapping[tuple[str, str], list[FloatArray]], layer: str, size: int) -> FloatArray:  # (4, B)
        calls = step.get((layer, block))
        return np.full((4, size), np.nan) if calls is None else np.mean(calls, axis=0)

    parts = []
    for record in records:
        size = next(iter(record.steps[0].values()))[0].shape[1]
        parts.append(np.stack([[cell(step, layer, size) for layer in layers] for step in record.steps]))
    table = np.concatenate(parts, axis=3).transpose(2, 3, 0, 1)  # (T, layers, 4, P) -> (4, P, T, layers)
    return Values(*table)


def _maps(records: Sequence[_Record], latent_shape: tuple[int, ...]) -> FloatArray | None:
    """(K, T, rows, columns), every layer enlarged to the finest one; None if tokens form no grid like the latents'.

    Latents with frames, or of another rank, are no grid of rows and columns.
    """
    found = [record for record in records if any(record.maps)]
    if not found:
        return None
    parts = []
    for record in found:
        steps = [[_grid(sum(calls) / len(calls), latent_shape) for calls in step.values()] for step in record.maps]
        grids = [grid for step in steps for grid in step if grid is not None]
        if not grids:
            return None
        size = max((grid.shape[-2], grid.shape[-1]) for grid in grids)
        layers = [torch.stack([_enlarged(grid, size) for grid in step if grid is not None]) for step in steps]
        parts.append(torch.stack([each.mean(dim=0) for each in layers], dim=1))
    maps: FloatArray = torch.cat(parts).double().numpy()
    return maps


def _grid(tokens: Tensor | float, latent_shape: tuple[int, ...]) -> Tensor | None:  # (K, rows, columns)
    """Image tokens in the shape of the latents, row by row, if their number allows it."""
    assert isinstance(tokens, Tensor), "a sum of at least one call"
    height, width = latent_shape[-2:]
    patch = math.sqrt(height * width / tokens.shape[1])
    rows, columns = round(height / patch), round(width / patch)
    return tokens.view(-1, rows, columns) if rows * columns == tokens.shape[1] else None


def _enlarged(grid: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(grid[:, None], size=size, mode="nearest")[:, 0]
