"""Which process of a run this one is, as a launcher's environment variables say; most runs are one process."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Place:
    """The place of a process among those of a run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # on its machine
    local_size: int = 1
    address: str = ""  # where they find each other
    port: int = 0
    agent_keeps_store: bool = False  # torchrun does; else the first process
    attempt: int = 0  # how often torchrun has started them again

    @property
    def alone(self) -> bool:
        """True for a run of one process."""
        return self.size == 1


def place() -> Place:
    """The place of this process, from what torchrun, or `accelerate launch` on GPUs, told it.

    Raises:
        AegpoError: if this is one of several processes and was not told all it needs.
    """
    size = _launched()
    if size == 1:
        return Place()
    told = {name: os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "MASTER_PORT")}
    address = os.environ.get("MASTER_ADDR", "")
    if not address or not all(_is_number(value) for value in told.values()):
        unknown = [name for name, value in told.items() if not _is_number(value)]
        missing = ", ".join([*unknown, *([] if address else ["MASTER_ADDR"])])
        raise AegpoError(
            f"{size} processes were launched, but not told who they are ({missing}); start them with 'aegpo run FILE "
            "--processes N', or with torchrun"
        )
    rank = int(told["RANK"])
    return Place(
        rank,
        size,
        _number("LOCAL_RANK", rank),
        _number("LOCAL_WORLD_SIZE", size),
        address,
        int(told["MASTER_PORT"]),
        os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        _number("TORCHELASTIC_RESTART_COUNT", 0),
    )


def started_alone(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process that this one starts: what a launcher said of this one does not hold there."""
    return {name: value for name, value in environment.items() if name not in _RANKS and not name.startswith(_ELASTIC)}


def parent() -> int | None:
    """The process that started this one and waits for it: aegpo, or torchrun's agent; None: nobody does.

    Raises:
        AegpoError: if somebody else set the variable that says so.
    """
    given = os.environ.get(PARENT)
    if given is not None and not (given.isdecimal() and given.isascii()):
        raise AegpoError(f"{PARENT} is {given!r}; aegpo sets it to a process's number for runs it starts: unset it")
    if given is None:
        return None if _launched() == 1 else os.getppid()
    return int(given)


def refuse_several_processes() -> None:
    """Lets a process go on that was started alone; a launcher's number of 1 is fine.

    Raises:
        AegpoError: if this is one of several that were launched for one command.
    """
    for name in _SIZES:
        size = os.environ.get(name, "")
        if _is_number(size) and int(size) > 1:
            raise AegpoError(
                f"{size} processes were launched ({name}={size}), but this command is one process; start it without "
                f"torchrun or another launcher, or unset {name}"
            )


def _launched() -> int:
    """How many processes were launched for this command."""
    sizes = [os.environ.get(name, "") for name in _SIZES]
    return max([1, *(int(size) for size in sizes if _is_number(size))])


def _number(name: str, default: int) -> int:
    given = os.environ.get(name, "")
    return int(given) if _is_number(given) else default


def _is_number(text: str) -> bool:
    return text.isdecimal() and text.isascii()
