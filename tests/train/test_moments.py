"""Moments in 8 bits: the real package on a CPU, its state in checkpoints, and what is said without it."""

from __future__ import annotations

import sys

import pytest
import torch
from test_engine import assert_same_weights, build, run
from torch import nn
from worlds import GaussianSpec, small_experiment

from aegpo.core.moments import BLOCK, LEAST_8BIT, moment_bytes
from aegpo.core.sections import OptimizerSpec
from aegpo.errors import AegpoError
from aegpo.runs import checkpoints
from aegpo.train.optimizers import load_state_by_name, make_optimizer, state_by_name

SIZES = {"large": (64, 100), "odd": (LEAST_8BIT + 1,), "small": (8, 8)}


@pytest.fixture
def _package():
    pytest.importorskip("bitsandbytes", reason='pip install "aegpo[bitsandbytes]"; nox -s bitsandbytes runs this')


@pytest.fixture
def _no_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)


def weights(seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {name: nn.Parameter(torch.randn(size, generator=generator)) for name, size in SIZES.items()}


def descend(optimizer, params, steps, seed=1):
    """Steps along noisy gradients of a bowl."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for weight in params.values():
            weight.grad = weight.detach() + torch.randn(weight.shape, generator=generator)
        optimizer.step()


def optimizer_of(params, moments="8bit", **changes):
    return make_optimizer(list(params.values()), OptimizerSpec(moments=moments, learning_rate=0.01, **changes))


@pytest.mark.usefixtures("_package")
@pytest.mark.parametrize("kind", ["adamw", "adam"])
def test_small_tensors_step_as_torch_does_and_large_ones_nearly_so(kind):
    ours, theirs, start = weights(), weights(), weights()
    descend(optimizer_of(ours, kind=kind, weight_decay=0.5), ours, 20)
    descend(optimizer_of(theirs, "float32", kind=kind, weight_decay=0.5), theirs, 20)
    torch.testing.assert_close(ours["small"], theirs["small"], rtol=1e-5, atol=1e-6)
    for name in ("large", "odd"):
        moved, off = (theirs[name] - start[name]).norm(), (ours[name] - theirs[name]).norm()
        assert 0 < off < 0.05 * moved


@pytest.mark.usefixtures("_package")
def test_the_state_is_eight_bits_a_moment_and_as_large_as_the_estimate_says():
    params = weights()
    optimizer = optimizer_of(params)
    descend(optimizer, params, 2)
    state = state_by_name(optimizer, list(params))
    assert state["large/state1"].dtype == state["odd/state2"].dtype == torch.uint8
    assert state["small/state1"].dtype == torch.float32
    for name, weight in params.items():
        kept = [value for key, value in state.items() if key.startswith(f"{name}/") and "qmap" not in key]
        found = sum(value.numel() * value.element_size() for value in kept if value.dim())
        assert found == moment_bytes(weight.numel(), "8bit")
    assert moment_bytes(BLOCK * 1000, "8bit") == 2 * (BLOCK * 1000) + 2 * 4 * 1000


@pytest.mark.usefixtures("_package")
def test_state_that_went_through_a_checkpoint_goes_on_bit_for_bit(tmp_path):
    straight, first = weights(), weights()
    whole, half = optimizer_of(straight), optimizer_of(first)
    descend(whole, straight, 3, seed=1)
    descend(half, first, 3, seed=1)
    saved = checkpoints.Checkpoint(1, {f"optimizer/{k}": v for k, v in state_by_name(half, list(first)).items()}, {})
    checkpoints.save(tmp_path, saved, keep=1)
    loaded = checkpoints.load_latest(tmp_path).tensors
    second = {name: nn.Parameter(weight.detach().clone()) for name, weight in first.items()}
    again = optimizer_of(second)
    load_state_by_name(again, list(second), {k.removeprefix("optimizer/"): v for k, v in loaded.items()})
    descend(whole, straight, 3, seed=2)
    descend(again, second, 3, seed=2)
    for name in SIZES:
        assert torch.equal(straight[name], second[name])
    one, other = state_by_name(whole, list(straight)), state_by_name(again, list(second))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.usefixtures("_package")
@pytest.mark.parametrize("kind", ["adamw", "adam"])
def test_a_resumed_run_has_the_same_weights_bit_for_bit(tiny_spec, tmp_path, kind):
    experiment = small_experiment(tiny_spec, optimizer=OptimizerSpec(kind=kind, moments="8bit"))
    straight, _, _ = run(experiment, tmp_path / "straight")
    run(experiment, tmp_path / "broken", stop_after=2)
    saved = checkpoints.load_latest(tmp_path / "broken" / "checkpoints")
    assert saved.step == 2
    assert any(value.dtype == torch.uint8 for name, value in saved.tensors.items() if name.startswith("optimizer/"))
    second, _, _ = run(experiment, tmp_path / "broken")
    assert_same_weights(straight, second)


@pytest.mark.usefixtures("_no_package")
def test_a_missing_package_is_found_when_the_file_is_checked_and_says_the_command():
    experiment = small_experiment(GaussianSpec(), optimizer=OptimizerSpec(moments="8bit"))
    (problem,) = experiment.problems()
    assert problem.location == ("optimizer", "moments")
    assert problem.message == (
        "'8bit' needs the package bitsandbytes, which is not installed; install it with  "
        'pip install "aegpo[bitsandbytes]"  or choose float32'
    )
    with pytest.raises(AegpoError, match=r"^optimizer.moments: '8bit' needs the package bitsandbytes, which is not"):
        build(experiment)
    assert not list(small_experiment(GaussianSpec()).problems())
