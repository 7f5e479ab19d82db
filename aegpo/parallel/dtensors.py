"""Sharded tensors (DTensor), of which each process holds some rows: taken from whole ones, and made whole again."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def sharded(tensors: Mapping[str, Tensor]) -> dict[str, DTensor]:
    """Those of the tensors of which each process holds a part."""
    return {name: tensor for name, tensor in tensors.items() if isinstance(tensor, DTensor)}


def rows_of(like: DTensor) -> tuple[slice, ...]:
    """Which part of the whole tensor this process holds: a slice of each axis."""
    sizes, offsets = compute_local_shape_and_global_offset(like.shape, like.device_mesh, like.placements)
    return tuple(slice(offset, offset + size) for size, offset in zip(sizes, offsets, strict=True))


def own_part(whole: Tensor, like: DTensor) -> DTensor:
    """This process's part of a tensor that every process has whole; nothing is sent.

    Args:
        whole: of the shape of `like`, on any device.
        like: is cut as the result is, and lies where it goes.
    """
    assert whole.shape == like.shape, f"{tuple(whole.shape)} is no {tuple(like.shape)}"
    return of_rows(whole.detach()[rows_of(like)].clone(), like)


def of_rows(own: Tensor, like: DTensor) -> DTensor:
    """The sharded tensor of which each process holds these rows, those it holds of `like`; nothing is sent."""
    stride = torch.empty(like.shape, device="meta").stride()
    own = own.to(like.device).contiguous()
    return DTensor.from_local(
        own, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=stride
    )


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; of a sharded one every process has to ask, and then has it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

