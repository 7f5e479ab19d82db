"""Where a run computes, and in which dtypes it keeps what it computed."""

from __future__ import annotations

import torch

from aegpo.core.processes import Place
from aegpo.errors import AegpoError

STORAGE = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(name: str, place: Place | None = None) -> torch.device:
    """The device of `Experiment.device`; where it has no number, processes of a machine take its GPUs in turn.

    Raises:
        AegpoError: if it is a GPU that torch does not see.
    """
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise AegpoError(f"device {name!r} was asked for, but torch sees no CUDA device; use 'auto' or 'cpu'")
    if name == "cpu" or ":" in name or not torch.cuda.is_available():
        return torch.device("cpu" if name == "auto" else name)
    if place is None or place.alone:
        return torch.device("cuda")
    device = torch.device("cuda", place.local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)  # what is called "cuda" here is this process's own
    return device
