"""Where a run computes, and in which precision."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from aegpo.core.experiment import Experiment
from aegpo.core.processes import refuse_several_processes
from aegpo.errors import AegpoError

STORAGE = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PRECISION = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}


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


def make_accelerator(experiment: Experiment, device: torch.device) -> Accelerator:
    """Mixed precision and gradient scaling; one process for now.

    Raises:
        AegpoError: if the device cannot compute in the experiment's precision, or several processes were launched.
    """
    if experiment.precision == "float16" and device.type != "cuda":
        raise AegpoError(f"precision 'float16' needs a CUDA device, not {device.type!r}; use 'bfloat16' or 'float32'")
    refuse_several_processes()
    AcceleratorState._reset_state(reset_partial_state=True)  # runs of one process may differ in precision
    return Accelerator(mixed_precision=PRECISION[experiment.precision], cpu=device.type == "cpu")
