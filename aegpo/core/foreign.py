"""Foreign code at work: what it raises is told with its kind and name, and what others rely on stays as it was.

A part may raise anything, `SystemExit` and `KeyboardInterrupt` too: a plugin that gives up is neither a success nor the
user's Ctrl-C. And it may leave changed nothing that the rest of a run computes with: torch's default dtype, whether
gradients are recorded, the working directory, the standard streams, the global generators' seeds.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from aegpo.core import first_edition
from aegpo.core.memory import is_shortage
from aegpo.errors import AegpoError, ContractError, UserInterrupt

_WORDS = 624  # of the state of a Mersenne Twister
_MOST_TWISTS = 4096  # that are looked through: two and a half million draws of one call


@contextmanager
def blaming(part: str, name: str, once: bool = False, kind: str | None = None) -> Iterator[None]:
    """Inside, a part is called or what it returned is checked: what it raises is told with its kind and name.

    Errors that say what would be right pass with their words, and get the part's key in an experiment as their
    location; a lack of memory passes as it is, for it is no part's fault, and so does the user's Ctrl-C.

    Args:
        part: its kind, such as ``reward``.
        name: its name.
        once: the part is called once in a training step, not for each micro-batch: then there is time to see whether
            it seeds the generators that others draw from.
        kind: what it is registered as, where it has a name of its own.

    Raises:
        ContractError: if the part fails, its cause is the part's own error; or if it changes what others rely on.
    """
    before, seeds, whose = Common.now(), _Seeds.now() if once else None, (part, kind or name)
    try:
        yield
    except AegpoError as error:
        before.restore()
        error.location, error.part = error.location or (part,), error.part or whose
        raise
    except BaseException as error:
        before.restore()
        if is_shortage(error) or of_user(error):
            raise
        failed = f"{part} {name!r} failed with {first_edition.told(error, part)}"
        raise blamed(ContractError(failed), *whose) from error
    changed = before.restore()
    if seeds is not None and seeds.restore():
        warnings.warn(
            f"{part} {name!r} seeds the global generators, which others draw from, or draws millions of numbers from "
            "them; that was undone: let it draw from a generator of its own",
            stacklevel=3,
        )
    if changed is not None:
        raise blamed(ContractError(f"{part} {name!r} {changed}"), *whose)


def blamed(error: ContractError, part: str, kind: str) -> ContractError:
    """The error of a part, with the part's place in an experiment."""
    error.location, error.part = (part,), (part, kind)
    return error


def of_user(error: BaseException) -> bool:
    """True for the user's Ctrl-C: where nobody else watches for it, Python raises a KeyboardInterrupt for it."""
    unwatched = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    return isinstance(error, UserInterrupt) or (unwatched and isinstance(error, KeyboardInterrupt))


@contextmanager
def watching_for_the_user() -> Iterator[None]:
    """Inside, Ctrl-C raises `UserInterrupt`, unless somebody else watches for it."""
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:
        yield
        return

    def interrupt(*_: object) -> None:
        raise UserInterrupt

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@dataclass(frozen=True)
class Common:
    """What every part relies on and none may leave changed; of torch only where it is imported."""

    dtype: Any
    grad: bool
    folder: str | None  # None: it is gone
    streams: tuple[IO[str] | None, ...]

    @classmethod
    def now(cls) -> Common:
        """As it is."""
        torch = sys.modules.get("torch")
        dtype, grad = (None, True) if torch is None else (torch.get_default_dtype(), torch.is_grad_enabled())
        return cls(dtype, grad, _folder(), (sys.stdout, sys.stderr))

    def restore(self) -> str | None:
        """Sets back what was changed; says what that was, in words that follow a name."""
        torch, changed = sys.modules.get("torch"), None
        if torch is not None:
            dtype = self.dtype or torch.float32
            if (left := torch.get_default_dtype()) != dtype:
                torch.set_default_dtype(dtype)
                changed = f"left torch's default dtype at {left}; others rely on {dtype}: set it back before returning"
            if torch.is_grad_enabled() != self.grad:
                torch.set_grad_enabled(self.grad)
                changed = f"left gradients {'off' if self.grad else 'on'} for others; use 'with torch.no_grad()'"
        if self.folder is not None and (folder := _folder()) != self.folder:
            os.chdir(self.folder)
            changed = f"left the working directory at {folder}; others rely on {self.folder}: go back before returning"
        for name, stream in zip(("stdout", "stderr"), self.streams, strict=True):
            if stream is not None and stream.closed:
                setattr(sys, name, _nowhere())
                changed = f"closed {name}, which the run still writes to; leave it open"
        return changed


def _folder() -> str | None:
    try:
        return os.getcwd()  # noqa: PTH109  a Path costs ten times as much
    except FileNotFoundError:
        return None


def _nowhere() -> IO[str]:
    """What stands in for a stream that was closed, so that the error can be told and the state saved."""
    return open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123  it stays open


@dataclass(frozen=True)
class _Seeds:
    """The states of the global generators."""

    python: Any
    numpy: Any
    seed: int | None  # of torch
    torch: Any

    @classmethod
    def now(cls) -> _Seeds:
        torch = sys.modules.get("torch")
        seed, state = (None, None) if torch is None else (torch.initial_seed(), torch.get_rng_state())
        return cls(random.getstate(), np.random.get_state(legacy=False), seed, state)

    def restore(self) -> bool:
        """Sets back those that were seeded since; those that were drawn from stay where they are."""
        now, torch, seeded = _Seeds.now(), sys.modules.get("torch"), False
        if now.python[1] != self.python[1] and _seeded(_words(self.python[1]), _words(now.python[1])):
            random.setstate(self.python)
            seeded = True
        old, new = self.numpy["state"], now.numpy["state"]
        moved = old["pos"] != new["pos"] or not np.array_equal(old["key"], new["key"])
        if moved and _seeded((old["key"], old["pos"]), (new["key"], new["pos"])):
            np.random.set_state(self.numpy)
            seeded = True
        if torch is not None and self.torch is not None and now.seed != self.seed:
            torch.set_rng_state(self.torch)
            seeded = True
        return seeded


_Twister = tuple[NDArray[np.uint32], int]  # (624,) and the place of the next word


def _words(state: tuple[int, ...]) -> _Twister:
    return np.array(state[:_WORDS], dtype=np.uint32), state[_WORDS]


def _seeded(before: _Twister, after: _Twister) -> bool:
    """True if a Mersenne Twister did not get from one state to another by draws, unless by millions."""
    key, place = before
    if np.array_equal(key, after[0]):
        return after[1] < place
    twister = np.random.MT19937()
    twister.state = {"bit_generator": "MT19937", "state": {"key": key, "pos": place}}
    twister.random_raw(_WORDS - place)
    for _ in range(_MOST_TWISTS):
        twister.random_raw(_WORDS)
        if np.array_equal(twister.state["state"]["key"], after[0]):
            return False
    return True
