"""FLOPs of whole training steps."""

from __future__ import annotations

from contextlib import AbstractContextManager

from torch.utils.flop_counter import FlopCounterMode


class Flops(FlopCounterMode):
    """A counter that does not ask which module computes: its hooks keep the gradients of every module."""

    def __init__(self) -> None:
        """Counts nothing until it is entered."""
        super().__init__(display=False)
        self.mod_tracker = _Nowhere()  # type: ignore[assignment]


class _Nowhere(AbstractContextManager[None]):
    """What the counter asks where it is."""

    parents = ("Global",)

    def __exit__(self, *error: object) -> None:
        """Nothing has been begun."""
