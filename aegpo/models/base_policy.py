"""The frozen base policy beside the one that is trained: adapters switched off, or a copy of the weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from aegpo.errors import AegpoError
from aegpo.models.unread import is_unread

BASE = "base"  # of `Model.frozen`


class BasePolicy:
    """Gives the base network on demand.

    With LoRA the base is the policy with its adapters disabled and costs no memory. With full fine-tuning it is a
    copy, taken when `active` is entered first; the engine does that before it loads or trains any weight.
    """

    def __init__(self, policy: nn.Module, waits_on: torch.device | None = None) -> None:
        """`policy`: as it was loaded, in dtypes that the copy keeps; `waits_on`: where it stays while not active."""
        self._policy, self._waits_on, self.dtypes = policy, waits_on, dtypes_of(policy)
        self._copy: nn.Module | None = None
        self._inside: nn.Module | None = None  # the base network while `active` is entered
        self._stays = False  # where it is

    @contextmanager
    def active(self) -> Iterator[nn.Module]:
        """The base network; adapters are off inside and on again after the outermost."""
        if self._inside is not None:
            yield self._inside
            return
        with self._entered() as self._inside:
            try:
                yield self._inside
            finally:
                self._inside = None

    def shard(self, spread: Callable[[nn.Module], None]) -> None:
        """Spreads the weights of the copy, if there is one, over processes; it stays on its device then."""
        if self._copy is not None:
            if not is_unread(self._copy):
                self._copy.to(next(self._policy.parameters()).device)
            spread(self._copy)
            self._stays = True

    def _copied(self) -> nn.Module:
        """The policy again, in the dtypes of the copy from the start: two of float32 may be more than a GPU has."""
        made: dict[int, Any] = {}
        for name, tensor in _tensors(self._policy):
            kept = tensor.detach().to(self.dtypes[name], copy=True)
            made[id(tensor)] = nn.Parameter(kept, False) if isinstance(tensor, nn.Parameter) else kept
        return copy.deepcopy(self._policy, made)

    @contextmanager
    def _entered(self) -> Iterator[nn.Module]:
        adapters = [module for module in self._policy.modules() if isinstance(module, BaseTunerLayer)]
        if not adapters:
            yield from self._moved_copy()
            return
        for adapter in adapters:
            adapter.enable_adapters(False)
        try:
            yield self._policy
        finally:
            for adapter in adapters:
                adapter.enable_adapters(True)

    def _moved_copy(self) -> Iterator[nn.Module]:
        device = next(self._policy.parameters()).device
        if self._copy is None:
            copied = self._copied().eval().requires_grad_(False)
            self._copy = copied if is_unread(copied) else copied.to(device=self._waits_on)
        if self._stays or is_unread(self._policy):
            yield self._copy
            return
        self._copy.to(device)
        try:
            yield self._copy
        finally:
            self._copy.to(self._waits_on or device)


def refuse_unknown(kind: str, name: str) -> None:
    """A model of this kind has one frozen network, its base.

    Raises:
        AegpoError: if `name` is another.
    """
    if name != BASE:
        raise AegpoError(f"model {kind!r} has no frozen network {name!r}; it has {BASE!r}")


def dtypes_of(network: nn.Module) -> dict[str, torch.dtype]:
    """The dtype of every weight and buffer, by name: a loader may keep some modules in float32."""
    return {name: tensor.dtype for name, tensor in _tensors(network)}


def cast(network: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
    """Gives weights and buffers the dtypes that `dtypes_of` found, tensor by tensor.

    `network.to(dtype)` would take no notice of those that diffusers keeps in float32, and warns of it.
    """
    for name, tensor in _tensors(network):
        tensor.data = tensor.data.to(dtypes[name])


def _tensors(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from network.named_parameters()
    yield from network.named_buffers()
