"""What a model can do where several processes of a run have a part of the weights each."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import nn


@runtime_checkable
class Shardable(Protocol):
    """A model whose frozen base can be spread over processes as its policy is; of others each process has it whole."""

    def shard_base(self, spread: Callable[[nn.Module], None]) -> None:
        """Calls `spread` with the frozen base, if that is a network of its own; it moves to no device afterwards."""


@runtime_checkable
class Unread(Protocol):
    """A model that may have been built without the values of its weights, by `ModelSpec.build_unread`."""

    def read_weights(self, network: nn.Module) -> None:
        """Gives the policy or its frozen base, sharded and on its device by now, the values of this process's part."""
