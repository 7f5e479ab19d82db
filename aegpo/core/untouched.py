"""What parts are shown and others still need: arrays that may only be read, tensors and plans that stay as they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from aegpo.core.records import RolloutPlan
from aegpo.errors import ContractError

if TYPE_CHECKING:
    from torch import Tensor


def read_only(array: NDArray[Any]) -> NDArray[Any]:
    """The same values for parts that may read them only; who has the array itself may go on writing into it."""
    view = array.view()
    view.flags.writeable = False
    return view


def check_untouched(part: str, name: str, before: Sequence[int], *tensors: Tensor) -> None:
    """Tensors that a part was given have the versions that `versions` gave: nobody wrote into them."""
    if tuple(before) != versions(*tensors):
        raise _wrote(part, name)


@contextmanager
def sparing(part: str, name: str, plan: RolloutPlan) -> Iterator[None]:
    """Inside, a part may read a plan.

    Raises:
        ContractError: if it writes into one of the plan's arrays.
    """
    arrays = [each for value in vars(plan).values() for each in (value if isinstance(value, tuple) else (value,))]
    shown = [each for each in arrays if isinstance(each, np.ndarray)]
    before = [each.copy() for each in shown]
    yield
    if not all(map(np.array_equal, before, shown)):
        raise _wrote(part, name)


def _wrote(part: str, name: str) -> ContractError:
    return ContractError(f"{part} {name!r} changed what it was given in place, which others still need; copy it first")


def versions(*tensors: Tensor) -> tuple[int, ...]:
    """How often each tensor has been written into; those of inference mode do not count."""
    return tuple(0 if tensor.is_inference() else tensor._version for tensor in tensors)
