"""Errors as the processes of a run tell them to each other, and raise them again."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from aegpo import errors
from aegpo.core.processes import Place
from aegpo.errors import AegpoError, ObserverError, ProcessLostError

_AGREED = "_aegpo_agreed"  # attribute of an error that all processes know of


@dataclass(frozen=True)
class Fault:
    """What went wrong in one process."""

    rank: int
    kind: str  # the class, among aegpo's own errors; "" for any other
    message: str
    location: Sequence[str | int] = ()
    part: Sequence[str] | None = None
    recorded: bool = True  # of an `ObserverError`

    def as_json(self) -> dict[str, Any]:
        """What `Fault(**...)` takes back."""
        return asdict(self)

    def error(self, place: Place, own: Exception | None) -> Exception:
        """The error that a process raises for it: its own if it is the one, with a note of who tells it."""
        known = getattr(errors, self.kind, None)
        if own is not None and self.rank == place.rank:
            error: Exception = own
        elif isinstance(known, type) and issubclass(known, AegpoError):
            error = _made(known, f"{self.message} (process {self.rank} of {place.size})")
            error.location = tuple(self.location)
            error.part = None if self.part is None else (self.part[0], self.part[1])
            if isinstance(error, ObserverError):
                error.recorded = self.recorded
        else:
            error = AegpoError(f"process {self.rank} of {place.size} failed with {self.message}")
        tells = 0 if known is not None and self.kind else self.rank
        if isinstance(error, AegpoError):
            error.told_elsewhere = place.rank != tells
        setattr(error, _AGREED, True)
        return error


def fault_of(error: Exception, place: Place) -> Fault:
    """What the others are told of an error."""
    if isinstance(error, AegpoError):
        part = None if error.part is None else list(error.part)
        recorded = error.recorded if isinstance(error, ObserverError) else True
        return Fault(place.rank, type(error).__name__, error.message, list(error.location), part, recorded)
    where = traceback.extract_tb(error.__traceback__)
    last = f" in {where[-1].name}" if where else ""
    return Fault(place.rank, "", f"{type(error).__name__}: {error}{last}")


def agreed_on(error: Exception) -> bool:
    """True if all processes know of an error, or of the one it tells; or nobody is there any more to be told."""
    each: BaseException | None = error
    seen = list[BaseException]()  # an error that was raised from itself is its own cause
    while each is not None and not any(each is other for other in seen):
        seen.append(each)
        if getattr(each, _AGREED, False) or isinstance(each, ProcessLostError):
            return True
        each = each.__cause__
    return False


def in_other_words(error: AegpoError, words: str) -> AegpoError:
    """The same error with another message: of the same place and part, and known to as many processes."""
    other = _made(type(error), words)
    vars(other).update(vars(error))
    return other


def _made(kind: type[AegpoError], message: str) -> AegpoError:
    error = kind.__new__(kind)
    error.args = (message,)
    return error
