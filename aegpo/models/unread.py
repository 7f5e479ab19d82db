"""Networks whose weights have no values yet: each process reads its part of them once it is known which that is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def is_unread(network: nn.Module) -> bool:
    """True if weights of it have no values yet, so that it is on no device; see `ModelSpec.build_unread`."""
    return any(weight.is_meta for weight in network.parameters())


@contextmanager
def as_if_read(network: nn.Module) -> Iterator[None]:
    """Inside, weights without values look as if they were there, and take no memory: adapters are made beside them."""
    unread = [
        (module, name, weight)
        for module in network.modules()
        for name, weight in module._parameters.items()
        if weight is not None and weight.is_meta
    ]
    for module, name, weight in unread:
        seeming = torch.zeros(1, dtype=weight.dtype).expand(weight.shape)
        module._parameters[name] = nn.Parameter(seeming, requires_grad=False)
    yield
    for module, name, weight in unread:
        module._parameters[name] = weight


def given_room(network: nn.Module, device: torch.device) -> None:
    """Makes room on a device for the values that a network has not; whatever it has is moved there."""

    def placed(tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device)

    network._apply(placed)  # type: ignore[no-untyped-call]
