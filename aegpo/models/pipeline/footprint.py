"""Estimates what a run needs in memory: the network is built on the meta device, where weights take no space."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from aegpo.core.experiment import Experiment
from aegpo.core.footprint import Footprint, Shares
from aegpo.core.moments import FLOAT32, moment_bytes
from aegpo.core.phases import USABLE
from aegpo.core.records import Conditioning
from aegpo.models.adapters import add_adapters
from aegpo.models.pipeline.family import with_size
from aegpo.models.pipeline.loading import DTYPES
from aegpo.models.pipeline.options import PipelineOptions
from aegpo.parallel.sharding import units_of

BLOCKS = ("TransformerBlock", "ResnetBlock2D", "SingleTransformerBlock")  # what gradient checkpointing computes again
_ESTIMATE = {"lora": 1.25, "full": 2.0}  # see `_whole_from`


def footprint(spec: PipelineOptions, experiment: Experiment) -> Footprint:
    """Weights and states are exact up to buffers; activations are the outputs of all layers that training keeps.

    With gradient checkpointing those are the outputs of blocks, and all of the largest block; where it is left to the
    machine, they are given both ways. Decoding, rewards and the allocator's slack come on top.
    """
    config = spec.config_at_hand(spec.network) or spec.architecture
    with torch.device("meta"):
        network = getattr(diffusers, spec.network_class).from_config(dict(config))
        nn.Module.to(network, dtype=DTYPES[spec.dtype])
        add_adapters(network, experiment.policy, spec.adapter_targets)
    sizes = [(weight.numel(), weight.element_size(), weight.requires_grad) for weight in network.parameters()]
    trainable = sum(count for count, _, trained in sizes if trained)
    decoder = spec.vae_parameters * DTYPES[spec.vae_dtype].itemsize
    copied = experiment.policy.train == "full" and not spec.offload_base
    base = trainable * DTYPES[spec.dtype].itemsize if copied else 0
    weights = sum(count * size for count, size, _ in sizes) + decoder + base
    copies = 1 + (experiment.policy.ema is not None)  # the gradient, the average
    kept, each = experiment.optimizer.moments, experiment.optimizer.num_moments
    moments = sum(moment_bytes(count, kept, each) for count, _, trained in sizes if trained)
    optimizer = copies * trainable * FLOAT32 + moments
    gathered = _gathered(network, DTYPES[spec.dtype].itemsize)
    *both, sampled = _activations(spec, network)
    whole, few = (experiment.largest_batch * each for each in both)
    shares = Shares(decoder, base, trainable * FLOAT32, *gathered, experiment.rollouts.latents_at_once * sampled)
    found = Footprint(
        parameters=sum(count for count, _, _ in sizes),
        trainable=trainable,
        weights=weights,
        optimizer=optimizer,
        activations=whole if spec.gradient_checkpointing is False else few,
        recomputes=spec.gradient_checkpointing is not False,
        retained=experiment.retained_bytes,
        shares=None if kept == "8bit" or (experiment.policy.train == "full" and spec.offload_base) else shares,
    )
    if spec.gradient_checkpointing != "auto":
        return found
    return replace(found, whole=whole, whole_from=_whole_from(experiment, weights + optimizer, whole))


def _whole_from(experiment: Experiment, fixed: int, activations: int) -> int:
    """Free memory, in bytes, in which a training step fits that computes no activations again (our choice).

    Beside what is `fixed` there have to be the graphs that sampling keeps, and the activations: of LoRA 1.25 times the
    estimate, which was 1.05 times what SD 3.5 took on a GPU, else twice, as a test shows that it is within a factor of
    two. That may take four fifths: the rest is for rewards, decoding and slack.
    Keeping activations is worth more than keeping graphs: it saves a forward pass of every state, as graphs do of some.
    """
    most, needed = experiment.retained_bytes, _ESTIMATE[experiment.policy.train] * activations
    return math.ceil((fixed + (2 * needed if most is None else most + needed)) / USABLE)


def _gathered(network: nn.Module, size: int) -> tuple[int, int, int]:
    """Bytes of all weights, of the largest unit, and of what is in none, where a gathered weight has `size` of them."""
    units = [_count(unit) * size for unit in units_of(network)]
    every = _count(network) * size
    return every, max(units, default=0), every - sum(units)


def _count(network: nn.Module) -> int:
    return sum(weight.numel() for weight in network.parameters())


@torch.no_grad()
def _activations(spec: PipelineOptions, network: Any) -> tuple[int, int, int]:
    """Bytes that one transition needs: to learn without and with gradient checkpointing, and to be sampled.

    To be sampled it needs the outputs of the largest block's layers at most, and the block's own.
    """
    device, pixels = torch.device("meta"), spec.pixels_per_latent()
    family = spec.family(network, device)
    shape = (1, spec.channels(), spec.height // pixels, spec.width // pixels)
    length, width, pooled = spec.text_shape(network.config)
    text = torch.empty(1, length, width, device=device)
    cond = Conditioning(text, None if pooled is None else torch.empty(1, pooled, device=device))
    cond = with_size(family, cond, spec.height, spec.width)
    nn.Module.float(network)
    with _kept_outputs(network) as kept:
        family.predict(network, torch.empty(shape, device=device), torch.empty(1, device=device), cond)
    layers, blocks = kept
    inside = {block: sum(n for name, n in layers.items() if name.startswith(f"{block}.")) for block in blocks}
    whole = sum(layers.values())
    few = whole + sum(blocks.values()) - sum(inside.values()) + max(inside.values())
    guided, size = 2 if family.scale != 1.0 else 1, DTYPES[spec.dtype].itemsize
    each = size * (guided if spec.guidance_gradient == "both" else 1)
    return whole * each, few * each, (max(inside.values()) + max(blocks.values())) * guided * size


@contextmanager
def _kept_outputs(network: nn.Module) -> Iterator[tuple[dict[str, int], dict[str, int]]]:
    """Inside, counts the numbers that layers and blocks return, by name."""
    layers: dict[str, int] = {}
    blocks: dict[str, int] = {}
    handles = []

    def count(into: dict[str, int], name: str) -> Any:
        def hook(module: nn.Module, given: Any, output: Any) -> None:
            tensors = output if isinstance(output, tuple) else (output,)
            found = sum(tensor.numel() for tensor in tensors if isinstance(tensor, Tensor))
            into[name] = into.get(name, 0) + found

        return hook

    for name, module in network.named_modules():
        if type(module).__name__.endswith(BLOCKS):
            handles.append(module.register_forward_hook(count(blocks, name)))
        elif not any(True for _ in module.children()):
            handles.append(module.register_forward_hook(count(layers, name)))
    try:
        yield layers, blocks
    finally:
        for handle in handles:
            handle.remove()
