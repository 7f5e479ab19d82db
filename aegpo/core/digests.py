"""SHA-256 of numbers: what tells whether two of them, or all that they depend on, are the same to the bit."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

from aegpo.core.records import Conditioning
from aegpo.core.sharing import Arrays

if TYPE_CHECKING:
    from torch import Tensor


def checksum(arrays: Arrays) -> str:
    """Of arrays with their names, types and shapes."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def digest_of_told(cond: Conditioning) -> str:
    """Of everything that a network is told about some prompts: names, types, shapes and values."""
    told = {"text": cond.text, "pooled": cond.pooled, "mask": cond.mask}
    told |= {f"extra/{name}": tensor for name, tensor in cond.extra.items()}
    digest = hashlib.sha256()
    for name, tensor in told.items():
        if tensor is not None:
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(_bytes_of(tensor))
    return digest.hexdigest()


def _bytes_of(tensor: Tensor) -> bytes:
    import torch

    content: bytes = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return content
