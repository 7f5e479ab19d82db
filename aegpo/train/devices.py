"""Where a run computes, and in which dtypes it keeps what it computed."""

from __future__ import annotations

import torch

from aegpo.errors import AegpoError

STORAGE = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(name: str) -> torch.device:
    """The device of `Experiment.device`.

    Raises:
        AegpoError: if it is a GPU that torch does not see.
    """
    if name != "auto":
        if name.startswith("cuda") and not torch.cuda.is_available():
            raise AegpoError(f"device {name!r} was asked for, but torch sees no CUDA device; use 'auto' or 'cpu'")
        return torch.device(name)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
