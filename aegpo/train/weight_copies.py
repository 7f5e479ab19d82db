"""Copies of the policy's trained weights: their running average, and the policy that samples while it lags behind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightCopy:
    """Trained weights as they were, by name; starts as what they are now."""

    def __init__(self, weights: Mapping[str, nn.Parameter]) -> None:
        self._weights = weights
        self.values = {name: weight.detach().clone() for name, weight in weights.items()}

    @torch.no_grad()
    def approach(self, decay: float) -> None:
        """Keeps `decay` of the copy and takes the rest from the trained weights."""
        torch._foreach_lerp_(list(self.values.values()), list(self._weights.values()), 1 - decay)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Inside, the policy has the weights of this copy."""
        current = {name: weight.detach().clone() for name, weight in self._weights.items()}
        assign(self._weights, self.values)
        try:
            yield
        finally:
            assign(self._weights, current)

    def state_dict(self, prefix: str) -> dict[str, Tensor]:
        """The copy, by name with a prefix."""
        return {prefix + name: value for name, value in self.values.items()}

    def load_state_dict(self, state: Mapping[str, Tensor], prefix: str) -> None:
        """Takes back what `state_dict` returned."""
        for name, value in self.values.items():
            value.copy_(state[prefix + name])


@torch.no_grad()
def assign(weights: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    """Copies values into weights of the same names, in place."""
    for name, weight in weights.items():
        weight.copy_(values[name])
