"""A plugin, for `--plugin tools/deterministic.py`: torch uses deterministic kernels, which equal bits on GPUs need."""

from __future__ import annotations

import os

import torch

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA is first used
torch.use_deterministic_algorithms(True)
