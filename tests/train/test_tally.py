"""What a step measured stays sums and counts until it is over, and parts with memory say something of their own."""

from __future__ import annotations

import doctest
import json
from itertools import pairwise
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_engine import build, run
from test_learning import NO_CHANGE, UNEQUAL, sampled
from worlds import GaussianSpec, execution, learner, run_loop, small_experiment

from aegpo.core.interfaces import Reporting
from aegpo.core.sections import CheckpointSpec, OptimizerSpec, PromptsSpec
from aegpo.errors import ContractError
from aegpo.method.advantages import RunningAdvantage
from aegpo.method.objectives import ClippedObjective
from aegpo.rewards.palette import PaletteReward
from aegpo.runs.trackers import JsonlTracker
from aegpo.train import tally as tallies
from aegpo.train.edges import edge_weights
from aegpo.train.engine import Engine
from aegpo.train.noise import StepNoise
from aegpo.train.tally import Tally

CPU = torch.device("cpu")
numbers = st.lists(st.integers(-1000, 1000), min_size=1, max_size=30)


# --- tallies ---------------------------------------------------------------------------------------------------------


def test_the_example_of_a_tally_is_true():
    assert doctest.testmod(tallies).attempted == 4 + 1


@given(numbers, st.randoms(use_true_random=False))
def test_a_mean_of_pieces_is_that_of_everything_however_it_was_cut(values, random):
    cuts = sorted({0, len(values), *(random.randint(0, len(values)) for _ in range(3))})
    pieces = [values[start:end] for start, end in pairwise(cuts)]
    tally, halves = Tally(), (Tally(), Tally())
    for number, piece in enumerate(pieces):
        for each in (tally, halves[number % 2]):
            each.add("mean", float(sum(piece)), len(piece))
            each.raise_to("most", float(max(piece)))
    merged = Tally()
    for half in halves:
        merged.merge(half)
    for each in (tally, merged):
        assert dict(each) == {"mean": sum(values) / len(values), "most": float(max(values))}
    assert len(tally) == 2


def test_a_mean_of_means_would_be_another_number():
    tally = Tally()
    tally.add("mean", 3.0, 3)  # three values of 1
    tally.add("mean", 5.0, 1)  # one of 5
    assert tally["mean"] == 2.0 != (1.0 + 5.0) / 2


def test_counts_that_only_rounding_keeps_from_whole_become_whole():
    tally = Tally()
    for _ in range(10):
        tally.add("all", 0.1, 0.1)
    tally.add("half", 1.0, 0.1 * 5)
    tally.raise_to("most", 7.0)
    counted = tally.counted(2)
    assert counted["all"] == sum([0.1] * 10) / 2
    assert counted["half"] == pytest.approx(1.0)
    assert counted["most"] == 7.0


# --- metrics of an update --------------------------------------------------------------------------------------------


class Sometimes(ClippedObjective):
    """Reports what it lost on bad edges, in batches where there are any."""

    kind: Literal["sometimes"] = "sometimes"

    def loss(self, update):
        loss, metrics = super().loss(update)
        return loss, metrics | ({"lost": loss.detach()} if bool((update.advantage < 0).all()) else {})


@pytest.mark.parametrize("reduction", ["prompt", "rollout"])
def test_a_metric_of_some_batches_is_the_mean_over_their_edges(reduction):
    how = execution(GaussianSpec().build(CPU), 4)
    rollouts, credit, cond = sampled(how, UNEQUAL)  # no siblings, which would be in one batch
    for optimizer in ({}, {"rollouts_per_update": 2}, {"inner_epochs": 2}):
        taught = learner(how, Sometimes(), **NO_CHANGE, micro_batch=1, reduction=reduction, **optimizer)
        metrics = taught.update(rollouts, credit, cond, np.random.default_rng(0), StepNoise(0))
        weight = edge_weights(rollouts.edges, reduction)
        bad = credit < 0
        assert 0 < int(bad.sum()) < len(bad)
        expected = float((weight * -credit)[bad].sum() / weight[bad].sum())
        assert metrics["lost"] == pytest.approx(expected, rel=1e-5)
        assert metrics["loss"] == pytest.approx(float((weight * -credit).sum()), abs=1e-6)


class Taking(ClippedObjective):
    """Has a metric under a name that is the engine's."""

    kind: Literal["taking"] = "taking"
    what: str = "loss"

    def loss(self, update):
        loss, metrics = super().loss(update)
        return loss, metrics | {self.what: loss.detach()}


@pytest.mark.parametrize("what", ["loss", "reward", "reward/brightness", "grad_norm"])
def test_a_metric_of_an_objective_that_the_engine_has_too_is_refused(what):
    engine, _ = build(small_experiment(GaussianSpec(), objective=Taking(what=what)))
    with pytest.raises(ContractError) as error:
        engine.step(1)
    assert str(error.value) == (
        f"objective 'taking' returned a metric {what!r}, which the engine has one of; call it otherwise"
    )


# --- what parts with memory say --------------------------------------------------------------------------------------


def remembering(**changes):
    """DDPO's advantage on four prompts that come again, which settle on their second visit."""
    arm = {
        "prompts": PromptsSpec(train_count=4, evaluation_count=4),
        "advantage": RunningAdvantage(least=5),
        "checkpoint": CheckpointSpec(every=1),
        "optimizer": OptimizerSpec(learning_rate=0.01),
    }
    return small_experiment(GaussianSpec(), **(arm | changes))


def test_running_statistics_report_how_many_prompts_they_know():
    engine, _ = build(remembering())
    assert isinstance(engine.advantage, Reporting)
    found = [engine.step(number).metrics for number in (1, 2, 3, 4)]
    assert [each["advantage/known_prompts"] for each in found] == [2, 4, 4, 4]
    assert [each["advantage/settled_prompts"] for each in found] == [0, 0, 2, 4]


def test_what_parts_report_is_recorded_and_goes_on_in_a_resumed_run(tmp_path):
    experiment = remembering(training_steps=4)
    folder = tmp_path / "test" / "arm" / "seed-0"
    _, recorded, _ = run(experiment, tmp_path / "whole")
    for stop in (2, None):
        engine = Engine.build(experiment)
        jsonl = JsonlTracker().build(folder)
        run_loop(engine, folder, {"jsonl": jsonl}, lambda stop=stop, engine=engine: engine.learner.updates == stop)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["metrics"]["advantage/settled_prompts"] for row in rows] == [0, 0, 2, 4]
    assert [row["metrics"] for row in rows] == [dict(report.metrics) for report in recorded.reports]


def test_parts_without_memory_report_nothing():
    engine, _ = build(small_experiment(GaussianSpec()))
    assert {name for name in engine.step(1).metrics if "/" in name} == {"reward/brightness"}


class Chatty(PaletteReward):
    """A reward that counts its calls."""

    kind: Literal["chatty"] = "chatty"  # type: ignore[assignment]
    last: ClassVar[Any] = 1.0

    def build(self, device):
        return Counting(self.last)


class Counting:
    """How often it was asked."""

    def __init__(self, last: Any) -> None:
        self.calls, self._last = 0, last

    def score(self, images, prompts):
        self.calls += 1
        return images.mean(dim=(1, 2, 3))

    def state_dict(self):
        return {"calls": self.calls}

    def load_state_dict(self, state):
        self.calls = state["calls"]

    def report(self):
        return {"calls": self.calls, "last": self._last}


def test_a_reward_reports_under_its_label_beside_its_scores():
    engine, _ = build(small_experiment(GaussianSpec(), rewards=(Chatty(name="mine"),)))
    metrics = engine.step(1).metrics
    assert metrics["reward-mine/calls"] == 1.0
    assert metrics["reward/mine"] == metrics["reward"]


@pytest.mark.parametrize("value", [float("nan"), True, "many"])
def test_a_report_that_is_no_finite_number_is_the_parts_fault(value, monkeypatch):
    monkeypatch.setattr(Chatty, "last", value)
    engine, _ = build(small_experiment(GaussianSpec(), rewards=(Chatty(name="mine"),)))
    with pytest.raises(ContractError) as error:
        engine.step(1)
    assert str(error.value) == f"reward 'mine' reported {value!r} as 'last'; a finite number was asked"
    assert error.value.location == ("reward",)
