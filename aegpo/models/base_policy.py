"""The frozen base policy beside the one that is trained: adapters switched off, or a copy of the weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


class BasePolicy:
    """Gives the base network on demand.

    With LoRA the base is the policy with its adapters disabled and costs no memory. With full fine-tuning it is a
    copy, taken when `active` is entered first; the engine does that before it loads or trains any weight.
    """

    def __init__(
        self, policy: nn.Module, waits_on: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        """`waits_on`: where the copy stays while it is not active; `dtype`: of the copy; None: as the policy."""
        self._policy, self._waits_on, self._dtype = policy, waits_on, dtype
        self._copy: nn.Module | None = None

    @contextmanager
    def active(self) -> Iterator[nn.Module]:
        """The base network; adapters are off inside and on again after."""
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
            copied = copy.deepcopy(self._policy).eval().requires_grad_(False)
            self._copy = copied.to(device=self._waits_on, dtype=self._dtype)
        self._copy.to(device)
        try:
            yield self._copy
        finally:
            self._copy.to(self._waits_on or device)
