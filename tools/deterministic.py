"""A plugin, for `--plugin tools/deterministic.py`: torch uses deterministic kernels, which equal bits on GPUs need."""

from __future__ import annotations

import os

import torch

import aegpo


def deterministic() -> None:
    """From now on; to be called before CUDA is first used, which is when it reads the variable."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)


@aegpo.hookimpl
def aegpo_register_models() -> None:
    """No model: every process asks its plugins for parts before it builds any."""
    deterministic()
