"""How many processes a launcher started; a run is one."""

from __future__ import annotations

import os
from collections.abc import Mapping

from aegpo.errors import AegpoError

PARENT = "AEGPOPARENT"  # environment variable that tells a child which process waits for it
DISK_REFUSED = 74  # exit code of such a child that could not write, as sysexits.h has it; its parent ends with 2
# of torchrun and of the launchers of MPI
_SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
# what torchrun tells each of its processes about the others
_RANKS = (
    "RANK",
    "LOCAL_RANK",
    "GROUP_RANK",
    "ROLE_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)
_ELASTIC = "TORCHELASTIC_"  # what it tells them about itself begins so


def started_alone(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process that this one starts: what a launcher said of this one does not hold there."""
    return {name: value for name, value in environment.items() if name not in _RANKS and not name.startswith(_ELASTIC)}


def parent() -> int | None:
    """The process that started this one to do a run of its own and waits for it; None: nobody does.

    Raises:
        AegpoError: if somebody else set the variable that says so.
    """
    given = os.environ.get(PARENT)
    if given is not None and not (given.isdecimal() and given.isascii()):
        raise AegpoError(f"{PARENT} is {given!r}; aegpo sets it to a process's number for runs it starts: unset it")
    return None if given is None else int(given)


def refuse_several_processes() -> None:
    """Lets a process go on that was started alone; a launcher's number of 1 is fine.

    Raises:
        AegpoError: if this is one of several that were launched for one command.
    """
    for name in _SIZES:
        size = os.environ.get(name, "")
        if size.isdecimal() and int(size) > 1:
            raise AegpoError(
                f"{size} processes were launched ({name}={size}), but a run is one process; start it without torchrun "
                f"or another launcher, or unset {name}; several runs at a time: --jobs"
            )
