"""The precision a run computes in: autocast, and loss scaling where float16 needs it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch import Tensor, nn

from aegpo.errors import AegpoError
from aegpo.parallel.dtensors import whole
from aegpo.train.devices import STORAGE


class Precision:
    """How a run computes: the autocast of its network, and for float16 the scaling of gradients.

    It is the run's own: runs of one process may differ in it.
    """

    def __init__(
        self, name: Literal["float32", "bfloat16", "float16"], device: torch.device, tf32: bool | None = None
    ) -> None:
        """`name`, `tf32`: of `Experiment.precision` and `Experiment.tf32`.

        Raises:
            AegpoError: if the device cannot compute so.
        """
        if name == "float16" and device.type != "cuda":
            raise AegpoError(
                f"precision 'float16' needs a CUDA device, not {device.type!r}; use 'bfloat16' or 'float32'"
            )
        if device.type == "cuda":
            allow_tf32(name == "bfloat16" if tf32 is None else tf32)
        self._device, self._dtype = device.type, None if name == "float32" else STORAGE[name]
        self.scaler = torch.amp.GradScaler(device.type) if name == "float16" else None

    def autocast(self) -> AbstractContextManager[object]:
        """Inside, the network's operations that bear it are of fewer bits."""
        return nullcontext() if self._dtype is None else torch.autocast(self._device, self._dtype)

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of a loss, scaled where they need it."""
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()  # type: ignore[no-untyped-call]

    def clip(self, optimizer: torch.optim.Optimizer, weights: Sequence[nn.Parameter], limit: float) -> float:
        """Scales gradients back, and down to a norm of `limit`; returns the norm before."""
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)
        return float(whole(nn.utils.clip_grad_norm_(weights, limit)))

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """One step of the optimizer; with a scaler, none where a gradient is not finite."""
        if self.scaler is None:
            optimizer.step()
            return
        self.scaler.step(optimizer)
        self.scaler.update()


def allow_tf32(allowed: bool) -> None:
    """Whether products and convolutions of float32 may be made of 19 bits on GPUs that have them; of the process."""
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed
