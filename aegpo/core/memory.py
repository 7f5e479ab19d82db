"""Memory that runs out: how it is recognised, and told with what to lower."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from aegpo.errors import MemoryShortageError

if TYPE_CHECKING:
    import torch

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3): what is given back, and what is got apart from the rest
_SIGNS = ("out of memory", "not enough memory", "DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED")


def is_shortage(error: BaseException) -> bool:
    """True for the ways in which torch, its libraries and Python say that no memory is left; imports no torch."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


@contextmanager
def enough_memory(doing: str, remedy: str) -> Iterator[None]:
    """Inside, a lack of memory is told as such.

    Args:
        doing: what is done inside, as in "while ... ran".
        remedy: what the user can do about it.

    Raises:
        MemoryShortageError: if there is not enough memory for what is done inside.
    """
    try:
        yield
    except Exception as error:
        if not is_shortage(error):
            raise
        raise MemoryShortageError(f"out of memory while {doing} ({brief(error)}); {remedy}") from error


def lower(setting: str, value: int) -> str:
    """The remedy that lowers a micro-batch, where it can be lowered."""
    if value > 1:
        return f"lower {setting!r}, which is {value}"
    return f"{setting!r} is 1 already: make smaller images, or use a device with more memory"


def brief(error: BaseException) -> str:
    """The sentence in which a library says that no memory is left."""
    sentences = (str(error).strip().splitlines() or [""])[0].split(". ")
    told = next((each for each in sentences if any(sign in each for sign in _SIGNS)), sentences[0])
    return f"{type(error).__name__}: {told}" if told else type(error).__name__


def free_bytes(device: torch.device) -> int:
    """Bytes that are free where a device computes: of its own, or of the machine's within the limit of a container.

    Where a system does not say, half of what it has.
    """
    if device.type == "cuda":
        import torch

        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + reserved
    free = [int(line.split()[1]) * 1024 for line in _lines("/proc/meminfo") if line.startswith("MemAvailable")]
    limit, used = (_lines(f"/sys/fs/cgroup/memory.{what}") for what in ("max", "current"))
    if limit and used and limit[0].isdigit():
        free.append(int(limit[0]) - int(used[0]))
    if not free:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2 if hasattr(os, "sysconf") else 0
    return max(0, min(free))


def keep_freed_memory() -> None:
    """Lets the process keep memory that it frees, for its next use: getting it again costs a page fault every 4 KiB.

    Graphs of a step are gigabytes that are freed and needed again in every step. Where the C library is not GNU's,
    nothing happens.
    """
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL("libc.so.6")
        library.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
        library.mallopt(_MMAP_THRESHOLD, 2**30)


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
