"""Each process of a run watches the others of its machine, so that none goes on for long after one that died.

Who waits for a dead process in a message is told by the message. Who is amid a long step, or waits for a third one that
is, is ended by its watch: within `GRACE` seconds all are gone, and the run can be started again.
"""

from __future__ import annotations

import os
import select
import socket
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from aegpo.core.processes import Place

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

GRACE = 5.0  # seconds that a process has to fail by itself, at its next message, once another is gone
_LOOK_EVERY = 0.5  # seconds between looks at the others


class Watch:
    """Ends this process some seconds after another one ended without having left."""

    def __init__(
        self, place: Place, pids: Mapping[int, int], has_left: Callable[[int], bool], tells: Callable[[], bool]
    ) -> None:
        """Watches from now on.

        Args:
            place: this process's.
            pids: by rank, those of the others on its machine.
            has_left: True if a process ended in an orderly way.
            tells: True if this process is to tell the user of one that did not.
        """
        self._place, self._has_left, self._tells = place, has_left, tells
        self._others = {rank: OtherProcess(pid) for rank, pid in pids.items()}
        self._over = threading.Event()
        threading.Thread(target=self._look, name="aegpo-watch", daemon=True).start()

    def stop(self) -> None:
        """All that was to be done together is done: the others may end."""
        self._over.set()

    def stopped(self) -> list[int]:
        """The processes of this machine that are stopped (SIGSTOP, a debugger), as far as the system says."""
        return [rank for rank, other in list(self._others.items()) if other.stopped()]

    def _look(self) -> None:
        while self._others and not self._over.wait(_LOOK_EVERY):
            for rank, other in list(self._others.items()):
                if other.gone():
                    del self._others[rank]
                    if not self._over.wait(GRACE) and not self._has_left(rank):
                        self._end(rank)

    def _end(self, rank: int) -> None:
        if self._tells():
            print(
                f"error: process {rank} of the {self._place.size} of this run ended amid a step, so the others end "
                "too; the run goes on from its newest checkpoint",
                file=sys.stderr,
                flush=True,
            )
        os._exit(1)  # the main thread may wait in a library that no exception reaches


class OtherProcess:
    """Another process of this machine, by its number."""

    def __init__(self, pid: int) -> None:
        self._pid, self._descriptor, self._gone = pid, None, False
        if sys.platform == "linux":
            try:
                self._descriptor = os.pidfd_open(pid)
            except ProcessLookupError:
                self._gone = True
            except OSError:  # a kernel that does not know of it, or a sandbox that forbids it
                pass

    def stopped(self) -> bool:
        """True if it is stopped, where there is a /proc to ask."""
        try:
            told = Path(f"/proc/{self._pid}/stat").read_text()
        except OSError:
            return False
        return told.rpartition(")")[2].split()[0] in ("T", "t")

    def gone(self) -> bool:
        """True once it ended, whoever has its number now."""
        if self._descriptor is not None and not self._gone:
            look = select.poll()
            look.register(self._descriptor, select.POLLIN)
            self._gone = bool(look.poll(0))
        elif not self._gone:
            try:
                os.kill(self._pid, 0)
            except ProcessLookupError:
                self._gone = True
            except PermissionError:
                pass
        return self._gone


def machine() -> str:
    """What the processes have in common that see each other's numbers."""
    space = ""
    with suppress(OSError):
        space = str(Path("/proc/self/ns/pid").readlink())
    return f"{socket.gethostname()} {space}"


def watched(place: Place, told: Sequence[tuple[str, int]], store: Store) -> Watch:
    """A watch of this machine's other processes.

    Args:
        place: this process's.
        told: by rank, the machine and number of each.
        store: that they keep, by a connection that nobody else waits for.
    """

    def has_left(rank: int) -> bool:
        try:
            return bool(store.check([left(rank)]))
        except RuntimeError:  # the store went with the process that kept it
            return False

    here = machine()
    pids = {rank: pid for rank, (where, pid) in enumerate(told) if where == here and rank != place.rank}
    return Watch(place, pids, has_left, lambda: asks_first(store))


def asks_first(store: Store) -> bool:
    """True for the first process that asks, which tells the user that another one was lost."""
    try:
        return int(store.add("told", 1)) == 1
    except RuntimeError:  # the store went with the process that kept it
        return True


def left(rank: int) -> str:
    """The key under which a process notes that it ends because all is done."""
    return f"left/{rank}"
