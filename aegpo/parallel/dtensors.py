"""Tensors of which each process has a part: the part of one that all have, and the whole of one that none has."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; of a sharded one, for which every process asks."""
    if not isinstance(tensor, DTensor):
        return tensor
    found: Tensor = tensor.full_tensor()
    return found


def local(tensor: Tensor) -> Tensor:
    """What this process has of a tensor; nothing is sent."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def own_part(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor that every process has whole, spread as another one of its shape is; nothing is sent.

    Args:
        tensor: the whole, on any device.
        like: says which part is this process's, its dtype and device; one that is not sharded asks for all of it.
    """
    if isinstance(tensor, DTensor) or not isinstance(like, DTensor):
        return tensor
    mesh, placements = like.device_mesh, like.placements
    shape, offset = compute_local_shape_and_global_offset(like.shape, mesh, placements)
    part = tensor[tuple(slice(first, first + count) for first, count in zip(offset, shape, strict=True))]
    part = part.to(device=like.to_local().device, dtype=like.dtype).contiguous()
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=like.shape, stride=like.stride())
