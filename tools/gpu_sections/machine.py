"""What rows were measured on."""

from __future__ import annotations

import datetime
import multiprocessing
import platform
import subprocess
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from aegpo.runs.child_processes import usable_cores
from gpu_sections.sections import Method, Row, context, told

ROOT = Path(__file__).resolve().parents[2]
METHODS: tuple[Method, ...] = ("fork", "spawn")  # the first is sooner there


def described(dry: bool) -> tuple[Row, Method]:
    """Device, versions, date and commit; and how the processes of sections can begin: fork or spawn.

    Raises:
        SystemExit: without a GPU, unless sizes are tiny.
    """
    device, method = _gpu() if not dry else ("cpu", METHODS[0])
    row: Row = {
        "device": device,
        "cores": usable_cores(),
        "torch": torch.__version__,
        "cuda": None if dry else torch.version.cuda,
        "python": platform.python_version(),
        "date": f"{datetime.datetime.now(tz=datetime.UTC):%Y-%m-%d}",
        "commit": _commit(),
        "dry": dry,
    }
    return row, method


def _gpu() -> tuple[str, Method]:
    """Name and memory of the GPU, asked in a process of its own: forked ones need CUDA untouched; and what worked."""
    problem = "torch sees no CUDA device"
    for method in METHODS:
        ours, theirs = multiprocessing.Pipe()
        asking = context(method).Process(target=_look, args=(theirs,))
        asking.start()
        theirs.close()
        try:
            name, problem = ours.recv()
        except EOFError:
            name, problem = "", f"a process that looked for a CUDA device ended with {asking.exitcode}"
        asking.join()
        if name:
            return name, method
    raise SystemExit(f"{problem}; --dry walks every section on a CPU")


def _look(pipe: Connection) -> None:
    try:
        properties = torch.cuda.get_device_properties(0)
    except Exception as error:  # whatever keeps CUDA from starting is told
        pipe.send(("", told(error)))
        return
    pipe.send((f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB", ""))


def _commit() -> str | None:
    words = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        answer = subprocess.run(words, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return answer.stdout.strip() or None


def quiet() -> None:
    """No progress bars between rows."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    of_diffusers.disable_progress_bar()
    of_transformers.disable_progress_bar()
