"""Whether GPUs may make products of float32 of 19 bits: a matter of the process, set before a run computes."""

from __future__ import annotations

import pytest
import torch

from aegpo.train.precision import Precision


@pytest.fixture
def _as_it_was():
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.usefixtures("_as_it_was")
@pytest.mark.parametrize(
    ("name", "tf32", "allowed"),
    [("float32", None, False), ("bfloat16", None, True), ("float32", True, True), ("bfloat16", False, False)],
)
def test_it_is_on_where_the_precision_is_bfloat16_or_as_it_was_set(name, tf32, allowed):
    Precision(name, torch.device("cuda"), tf32)
    assert torch.backends.cuda.matmul.allow_tf32 is allowed
    assert torch.backends.cudnn.allow_tf32 is allowed


@pytest.mark.usefixtures("_as_it_was")
def test_on_a_cpu_nothing_is_set():
    torch.backends.cuda.matmul.allow_tf32 = True
    Precision("float32", torch.device("cpu"), False)
    assert torch.backends.cuda.matmul.allow_tf32 is True
