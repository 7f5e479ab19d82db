"""Optimizers and schedules: closed forms, the rate each update takes, and runs that stop and go on."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_engine import assert_same_report, assert_same_weights, run
from test_learning import sampled
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from worlds import GaussianSpec, execution, learner, small_experiment

from aegpo.core.rates import ScheduleSpec
from aegpo.core.sections import OptimizerSpec
from aegpo.runs import checkpoints
from aegpo.train.noise import StepNoise
from aegpo.train.optimizers import make_optimizer

COSINE = ScheduleSpec(kind="cosine", warmup=1, final=0.1)
LINEAR = ScheduleSpec(kind="linear")


# --- schedules -------------------------------------------------------------------------------------------------------


def shares(updates: int, **fields) -> list[float]:
    return [ScheduleSpec(**fields).share(number, updates) for number in range(1, updates + 1)]


def test_a_constant_schedule_is_the_peak_from_the_first_update_to_the_last():
    assert shares(4) == [1.0] * 4


def test_a_warm_up_rises_in_equal_steps_and_its_next_update_has_the_peak():
    assert shares(6, warmup=3) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"kind": "linear"}, [1.0, 0.75, 0.5, 0.25, 0.0]),
        ({"kind": "linear", "final": 0.2}, [1.0, 0.8, 0.6, 0.4, 0.2]),
        ({"kind": "linear", "warmup": 2}, [1 / 3, 2 / 3, 1.0, 0.5, 0.0]),
        ({"kind": "cosine"}, [1.0, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125), 0.0]),
        ({"kind": "cosine", "final": 0.5, "warmup": 2}, [1 / 3, 2 / 3, 1.0, 0.75, 0.5]),
    ],
)
def test_lines_and_half_cosines_go_from_the_peak_to_the_last_updates_share(fields, expected):
    assert shares(5, **fields) == pytest.approx(expected, abs=1e-15)
    assert ScheduleSpec(**fields).share(9, 5) == pytest.approx(expected[-1])  # asked for more than a run makes


@given(st.sampled_from(["cosine", "linear"]), st.integers(0, 20), st.floats(0, 1), st.integers(22, 80))
def test_shares_rise_to_the_peak_once_and_then_only_fall(kind, warmup, final, updates):
    found = np.array(shares(updates, kind=kind, warmup=warmup, final=final))
    assert (np.diff(found[: warmup + 1]) > 0).all()
    assert found[warmup] == found.max() == 1.0
    assert (np.diff(found[warmup:]) <= 0).all()
    assert found[-1] == final


def rates_taken(how, **optimizer) -> tuple[list[float], list[dict[str, float]]]:
    """The learning rate of every optimizer step of two training steps, and their metrics."""
    seen: list[float] = []
    handle = register_optimizer_step_pre_hook(lambda taken, *_: seen.append(taken.param_groups[0]["lr"]))
    try:
        trained = learner(how, updates=8, inner_epochs=2, rollouts_per_update=4, **optimizer)
        metrics = [
            trained.update(*sampled(how, seed=seed), np.random.default_rng(0), StepNoise(0)) for seed in range(2)
        ]
    finally:
        handle.remove()
    return seen, metrics


@pytest.mark.parametrize("kind", ["adamw", "adam", "sgd"])
def test_every_update_takes_the_rate_of_its_number_and_the_step_records_its_last(kind):
    how = execution(GaussianSpec().build(torch.device("cpu")), 4)
    seen, metrics = rates_taken(how, kind=kind, learning_rate=0.01, schedule={"kind": "linear", "warmup": 3})
    assert seen == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.0075, 0.005, 0.0025, 0.0])
    assert [step["learning_rate"] for step in metrics] == [seen[3], seen[7]]


def test_a_rate_that_never_varies_is_no_metric():
    how = execution(GaussianSpec().build(torch.device("cpu")), 4)
    seen, metrics = rates_taken(how, learning_rate=0.01)
    assert seen == [0.01] * 8
    assert not any("learning_rate" in step for step in metrics)


def test_the_updates_of_a_run_are_known_in_advance_and_the_last_has_the_final_rate(tmp_path):
    optimizer = OptimizerSpec(learning_rate=0.01, schedule=COSINE, inner_epochs=2, rollouts_per_update=4)
    experiment = small_experiment(GaussianSpec(), optimizer=optimizer)
    engine, recorder, _ = run(experiment, tmp_path)
    assert engine.learner.updates == experiment.updates == 4 * 2 * 2
    assert recorder.reports[-1].metrics["learning_rate"] == pytest.approx(0.1 * 0.01)


# --- optimizers ------------------------------------------------------------------------------------------------------


def stepped(gradients, **fields) -> list[float]:
    """Where a weight that begins at 2 is after each of some gradients."""
    weight = nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    optimizer, places = make_optimizer([weight], OptimizerSpec(learning_rate=0.1, **fields)), []
    for gradient in gradients:
        weight.grad = torch.tensor([gradient], dtype=torch.float64)
        optimizer.step()
        places.append(float(weight.detach()))
    return places


def test_adamw_decays_beside_the_gradient_and_adam_through_it():
    assert stepped([0.0, 0.0], kind="adamw", weight_decay=0.5) == pytest.approx([2 * 0.95, 2 * 0.95**2])
    assert stepped([0.0], kind="adam", weight_decay=0.5) == pytest.approx([2 - 0.1])  # a first step is of size 1
    assert stepped([-7.0], kind="adam", weight_decay=0.5) == pytest.approx([2 + 0.1])
    assert stepped([-7.0], kind="adamw", weight_decay=0.5) == pytest.approx([2 * 0.95 + 0.1])


def test_sgd_steps_along_the_decayed_sum_of_gradients():
    plain = {"kind": "sgd", "weight_decay": 0.0}
    assert stepped([1.0, -2.0], momentum=0.0, **plain) == pytest.approx([1.9, 2.1])
    assert stepped([1.0, -2.0], momentum=0.5, **plain) == pytest.approx([1.9, 2.05])  # 0.5 * 1 - 2 = -1.5
    assert stepped([1.0], kind="sgd", weight_decay=0.5) == pytest.approx([1.8])


@pytest.mark.parametrize("kind", ["adamw", "adam", "sgd"])
def test_a_weight_may_have_its_first_gradient_later_than_others(kind):
    early, late = (nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = make_optimizer([early, late], OptimizerSpec(kind=kind, learning_rate=0.1))
    early.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(late, torch.ones(3))
    late.grad = torch.ones(3)
    optimizer.step()
    assert (late < 1).all()


@pytest.mark.parametrize(
    ("optimizer", "kept"),
    [
        ({"kind": "adamw", "schedule": COSINE}, {"step", "exp_avg", "exp_avg_sq"}),
        ({"kind": "adam", "schedule": LINEAR}, {"step", "exp_avg", "exp_avg_sq"}),
        ({"kind": "sgd", "schedule": COSINE}, {"momentum_buffer"}),
        ({"kind": "sgd", "momentum": 0.0, "schedule": ScheduleSpec(warmup=7)}, set()),
    ],
    ids=["adamw", "adam", "sgd", "sgd-without-momentum"],
)
def test_a_run_that_stops_and_goes_on_is_the_run_that_never_stopped(tiny_spec, tmp_path, optimizer, kept):
    spec = OptimizerSpec(learning_rate=0.01, rollouts_per_update=4, **optimizer)
    experiment = small_experiment(tiny_spec, optimizer=spec)
    straight, whole, _ = run(experiment, tmp_path / "straight")
    _, first, _ = run(experiment, tmp_path / "broken", stop_after=2)
    saved = checkpoints.load_latest(tmp_path / "broken" / "checkpoints")
    assert saved.step == 2
    state = [name.rpartition("/") for name in saved.tensors if name.startswith("optimizer/")]
    assert {key for _, _, key in state} == kept
    assert {name.removeprefix("optimizer/") for name, _, _ in state} <= set(straight.learner.weights.trained)
    again, second, _ = run(experiment, tmp_path / "broken")
    assert_same_weights(straight, again)
    for mine, yours in zip(whole.reports, [*first.reports, *second.reports], strict=True):
        assert_same_report(mine, yours)
    rates = [report.metrics["learning_rate"] for report in whole.reports]
    assert len(set(rates)) == 4  # no two steps end at the same rate
    mine, yours = (each.learner.state_dict() for each in (straight, again))
    assert mine.keys() == yours.keys()
    assert all(torch.equal(mine[name], yours[name]) for name in mine)
