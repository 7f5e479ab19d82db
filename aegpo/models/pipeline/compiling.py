"""torch.compile of a network's repeated blocks: one graph for all that are alike, instead of one of everything."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import nn

_BLOCK = "TransformerBlock"  # how diffusers' classes end that make up most of a transformer, and of a UNet's attention
# Variants of a block that may be compiled: its kinds, with and without gradients, adapters on or off, batch sizes. With
# torch's own limit of 8 the rest would run eager, with a warning.
_VARIANTS = 128


def compile_blocks(network: nn.Module) -> None:
    """Compiles the blocks of a network in place, at their first call; without such blocks all of it.

    Names of weights stay what they are, and copies of the network are not compiled.
    """
    torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, _VARIANTS)
    blocks = [module for module in network.modules() if type(module).__name__.endswith(_BLOCK)]
    for block in blocks or [network]:
        block.compile()


def eagerly() -> AbstractContextManager[None]:
    """Inside, what was compiled runs as if it were not, so that hooks and function modes see every operation."""
    stance: AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
    return stance
