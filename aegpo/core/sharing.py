"""What runs of one experiment would find out alike, and so need not each find out: the seams of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

Arrays = Mapping[str, "np.ndarray[Any, Any]"]
Shared = Literal["entropy", "evaluation"]


class Store(Protocol):
    """Keeps what the runs of an experiment measured of the policy before it was trained."""

    def known(self, what: Shared, depends_on: Callable[[], Mapping[str, Any]], measure: Callable[[], Arrays]) -> Arrays:
        """What `measure` would find, to the bit: as another run found it, else by asking it. Every process calls it.

        Args:
            what: kind of numbers.
            depends_on: as JSON, what they depend on but model, base, software and machine, which the store knows.
            measure: a pure function of that; the same arrays in every process.
        """


@runtime_checkable
class Sharing(Protocol):
    """A source of signals that measures what is the same in other runs."""

    def share(self, store: Store) -> None:
        """From now on it asks the store; what it says it spent stays what measuring takes."""


@runtime_checkable
class Identified(Protocol):
    """A reward whose scores follow from its spec, the images, the prompts and what it says here, and nothing else.

    Runs of an experiment may then share its scores of the same images. One that remembers, draws by chance or asks a
    server must not say so.
    """

    def identity(self) -> Mapping[str, Any]:
        """What scores depend on beside all that, as JSON: which weights it has. Nothing: {}."""
