"""Tensors of which each process has a part: the part of one that all have, and the whole of one that none has."""

from __future__ import annotations

from collections.abc import Mapping

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


def sharded(tensors: Mapping[str, Tensor]) -> dict[str, DTensor]:
    """Those of the tensors of which each process has a part."""
    return {name: tensor for name, tensor in tensors.items() if isinstance(tensor, DTensor)}


def own_part(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor that every process has whole, spread as another one of its shape is; nothing is sent.

    Args:
        tensor: the whole, on any device.
        like: says which part is this process's, its dtype and device; one that is not sharded asks for all of it.
    """
    if isinstance(tensor, DTensor) or not isinstance(like, DTensor):
        return tensor
    return of_own(tensor[own_slices(like)].to(like.dtype), like)


def own_slices(like: Tensor) -> tuple[slice, ...]:
    """Which part of the whole tensor this process has: a slice of each axis; all of one that is not sharded."""
    if not isinstance(like, DTensor):
        return tuple(slice(0, count) for count in like.shape)
    shape, offset = compute_local_shape_and_global_offset(like.shape, like.device_mesh, like.placements)
    return tuple(slice(first, first + count) for first, count in zip(offset, shape, strict=True))


def of_own(part: Tensor, like: DTensor) -> DTensor:
    """The tensor of which every process has such a part, those it has of `like`, on its device; nothing is sent."""
    own, mesh = part.to(like.to_local().device).contiguous(), like.device_mesh
    return DTensor.from_local(own, mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride())
