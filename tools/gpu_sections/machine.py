"""What rows were measured on."""

from __future__ import annotations

import datetime
import json
import multiprocessing
import os
import platform
import subprocess
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from gpu_sections.sections import Row, Value

ROOT = Path(__file__).resolve().parents[2]


def described(dry: bool) -> Row:
    """Device, versions, date and commit; asks CUDA in a process of its own, since forked ones need it untouched.

    Raises:
        SystemExit: without a GPU, unless sizes are tiny.
    """
    device = "cpu" if dry else _gpu()
    return {
        "device": device,
        "cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
        "cuda": None if dry else torch.version.cuda,
        "python": platform.python_version(),
        "date": f"{datetime.datetime.now(tz=datetime.UTC):%Y-%m-%d}",
        "commit": _commit(),
        "dry": dry,
    }


def _gpu() -> str:
    ours, theirs = multiprocessing.Pipe()
    asking = multiprocessing.get_context("fork").Process(target=_look, args=(theirs,))
    asking.start()
    theirs.close()
    try:
        name: str | None = json.loads(ours.recv())
    except EOFError:
        name = None
    asking.join()
    if name is None:
        raise SystemExit("torch sees no CUDA device; --dry walks every section on a CPU")
    return name


def _look(pipe: Connection) -> None:
    name: Value = None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        name = f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB"
    pipe.send(json.dumps(name))


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
