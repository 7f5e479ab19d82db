"""The frozen base policy beside the one that is trained: adapters switched off, or a copy of the weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


class BasePolicy:
    """Gives the base network on demand.

    With LoRA the base is the policy with its adapters disabled and costs no memory. With full fine-tuning it is a
    copy, taken when `active` is entered first; the engine does that before it loads or trains any weight.
    """

    def __init__(self, policy: nn.Module) -> None:
        self._policy = policy
        self._copy: nn.Module | None = None

    @contextmanager
    def active(self) -> Iterator[nn.Module]:
        """The base network; adapters are off inside and on again after."""
        adapters = [module for module in self._policy.modules() if isinstance(module, BaseTunerLayer)]
        if not adapters:
            if self._copy is None:
                self._copy = copy.deepcopy(self._policy).eval().requires_grad_(False)
            yield self._copy
            return
        for adapter in adapters:
            adapter.enable_adapters(False)
        try:
            yield self._policy
        finally:
            for adapter in adapters:
                adapter.enable_adapters(True)
