"""Counts the rows that a diffusers network is evaluated on, whoever calls it."""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

NETWORKS = ("SD3Transformer2DModel", "FluxTransformer2DModel", "UNet2DConditionModel")


class Rows:
    """Rows without and with gradient, since it was cleared."""

    def __init__(self) -> None:
        self.plain = self.learning = 0
        self.network: nn.Module | None = None  # that was evaluated last

    def clear(self) -> None:
        """Starts over."""
        self.plain = self.learning = 0

    def watch(self) -> None:
        """From now on, every network of these classes is watched, in this process."""
        import diffusers

        for name in NETWORKS:
            network = getattr(diffusers, name)
            network.forward = self._counting(network.forward)

    def _counting(self, forward: Any) -> Any:
        @wraps(forward)
        def counted(network: nn.Module, *args: Any, **kwargs: Any) -> Any:
            states: Tensor = args[0] if args else kwargs["hidden_states" if "hidden_states" in kwargs else "sample"]
            rows = len(states)
            self.network = network
            if torch.is_grad_enabled():
                self.learning += rows
            else:
                self.plain += rows
            return forward(network, *args, **kwargs)

        return counted
