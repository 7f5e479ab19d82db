"""What a rival sampled and learned in its first training step, left for aegpo to compute the same gradient from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class First:
    """Fills up while a rival does its first step; N rollouts in any order, of which those of a group follow on."""

    texts: list[str] = field(default_factory=list)  # N
    latents: Tensor | None = None  # (N, K, ...) before each of K trained denoising steps
    next_latents: Tensor | None = None  # (N, K, ...)
    log_prob: Tensor | None = None  # (N, K)
    levels: list[int] = field(default_factory=list)  # K
    advantage: Tensor | None = None  # (N,)
    scale: Tensor | None = None  # (T+1,) of each level, that states are larger by than aegpo's; None: 1
    gradients: dict[str, Tensor] = field(default_factory=dict)  # by the weight's name, before they are clipped

    def learned(self, network: nn.Module | None) -> None:
        """Takes the gradients of the first optimizer update."""
        assert network is not None
        if not self.gradients:
            named = ((name, weight.grad) for name, weight in network.named_parameters())
            self.gradients = {name: grad.detach().cpu().clone() for name, grad in named if grad is not None}

    def save(self, path: Path) -> None:
        """Writes all of it."""
        torch.save({name: _on_cpu(value) for name, value in vars(self).items()}, path)

    @classmethod
    def load(cls, path: Path) -> First:
        """What `save` wrote."""
        return cls(**torch.load(path, weights_only=True))


def _on_cpu(value: Any) -> Any:
    return value.detach().cpu() if isinstance(value, Tensor) else value


def relative_difference(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """L2 norm of the difference of all gradients, as a share of that of those wanted."""
    off = of = 0.0
    assert found.keys() == wanted.keys(), found.keys() ^ wanted.keys()
    for name, gradient in wanted.items():
        off += float((found[name].cpu().double() - gradient.double()).square().sum())
        of += float(gradient.double().square().sum())
    return float((off / of) ** 0.5)
