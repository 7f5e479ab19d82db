"""Variance-preserving networks (SD 1.x, SDXL) in flow coordinates: what they are told, and what they predict.

Imports torch only where it is used, because `aegpo.pipelines` offers this beside specs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aegpo.models.pipeline.schedules import DdimSchedule

if TYPE_CHECKING:
    import torch
    from torch import Tensor

WHOLE = 1e-2  # training times a noise level may be off a whole one because it is float32


class VariancePreserving:
    """x = a x0 + s noise with a^2 + s^2 = 1; the engine's latents are x / (a + s), at sigma = s / (a + s)."""

    def __init__(self, schedule: DdimSchedule, device: torch.device) -> None:
        import torch

        self._table = torch.from_numpy(schedule.table().copy()).to(device)  # (times,) float64, rising
        self._predicts_velocity = schedule.prediction_type == "v_prediction"

    def time(self, sigma: Tensor) -> Tensor:
        """(B,) noise levels -> (B,) float32 training times, between whole ones where the level lies between them."""
        import torch

        level = sigma.double().contiguous()
        upper = torch.searchsorted(self._table, level).clamp(1, len(self._table) - 1)
        below, above = self._table[upper - 1], self._table[upper]
        time = upper - 1 + (level - below) / (above - below)
        whole = time.round()
        return torch.where((time - whole).abs() < WHOLE, whole, time).float()

    def network_input(self, latents: Tensor, sigma: Tensor) -> Tensor:
        """(B, C, H, W), (B,) -> x, what the network was trained on: variance 1 at every level."""
        return latents.float() / _norm(sigma)

    def velocity(self, prediction: Tensor, latents: Tensor, sigma: Tensor) -> Tensor:
        """noise - x0 from what the network predicts.

        noise: x0 = (z - sigma noise) / (1 - sigma), so noise - x0 = (noise - z) / (1 - sigma).
        v = a noise - s x0 (arXiv 2202.00512, App. D): noise = a v + s x, x0 = a x - s v.
        """
        level, norm = _like(sigma), _norm(sigma)
        if self._predicts_velocity:
            return prediction / norm + (2 * level - 1) / norm.square() * latents.float()
        return (prediction - latents.float()) / (1 - level)


def _like(sigma: Tensor) -> Tensor:  # (B, 1, 1, 1)
    return sigma.float().view(-1, 1, 1, 1)


def _norm(sigma: Tensor) -> Tensor:  # (B, 1, 1, 1): 1 / (a + s)
    level = _like(sigma)
    return (level.square() + (1 - level).square()).sqrt()
