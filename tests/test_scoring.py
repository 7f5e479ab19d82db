"""Rewards in a run: in lanes, blamed by name, and failing without the loss of anything that was learned."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
import pytest
import torch
from test_engine import assert_same_report, assert_same_weights, run
from torch import Tensor
from worlds import BrightnessReward, small_experiment

from aegpo import checkpoints
from aegpo.allocators import EntropyAllocator
from aegpo.errors import RewardError
from aegpo.parts import RewardSpec
from aegpo.records import Prompt, StepReport
from aegpo.scoring import HeldOut, build_scorers, score
from aegpo.unreported import from_json, to_json

CPU = torch.device("cpu")
IMAGES = torch.rand((4, 3, 6, 6), generator=torch.Generator().manual_seed(0))
PROMPTS = ("one", "two", "one", "two")


class Meeting(RewardSpec):
    """Scores only once another reward scores at the same time."""

    kind: Literal["meeting"] = "meeting"
    place: str = ""
    barrier: ClassVar[threading.Barrier] = threading.Barrier(2, timeout=10)

    @property
    def lane(self) -> str:
        return self.place

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        self.barrier.wait()
        return images.mean(dim=(1, 2, 3))


class Scribbler(BrightnessReward):
    """Blackens the images it is given."""

    @property
    def lane(self) -> str:
        return "elsewhere"

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return images.zero_().mean(dim=(1, 2, 3))


class Brighter(RewardSpec):
    """The share of the other images of the prompt that are darker."""

    kind: Literal["brighter"] = "brighter"
    group_wise: ClassVar[bool] = True

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        light = images.mean(dim=(1, 2, 3))
        same = torch.tensor([[one == other for other in prompts] for one in prompts])
        return ((light[:, None] > light) & same).sum(1).float() / (same.sum(1) - 1)


class Flaky(BrightnessReward):
    """Fails at one call, counted over the life of the process."""

    left: ClassVar[list[int]] = [-1]

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        self.left[0] -= 1
        if self.left[0] == -1:
            raise ConnectionError("the server is gone")
        return super().score(images, prompts)


def test_rewards_of_different_lanes_score_at_the_same_time():
    scorers = build_scorers([Meeting(name="here"), Meeting(name="there", place="gpu")], CPU)
    scores = score(scorers, IMAGES, PROMPTS)
    assert list(scores) == ["here", "there"]
    assert torch.equal(scores["here"], scores["there"])


def test_rewards_of_one_lane_score_in_turn():
    scorers = build_scorers([Meeting(name="one"), Meeting(name="other")], CPU)
    Meeting.barrier.reset()
    barrier = threading.Barrier(2, timeout=0.2)
    Meeting.barrier, before = barrier, Meeting.barrier
    try:
        with pytest.raises(RewardError, match="reward 'one' failed with BrokenBarrierError"):
            score(scorers, IMAGES, PROMPTS)
    finally:
        Meeting.barrier = before


def test_scores_come_in_the_order_of_the_list_whatever_their_lanes():
    class Apart(BrightnessReward):
        @property
        def lane(self) -> str:
            return "elsewhere"

    specs = [BrightnessReward(name="a"), Apart(name="b"), BrightnessReward(name="c")]
    assert list(score(build_scorers(specs, CPU), IMAGES, PROMPTS)) == ["a", "b", "c"]


def test_the_reward_that_changes_the_images_is_blamed_in_any_lane():
    scorers = build_scorers([BrightnessReward(), Scribbler(name="scribbler")], CPU)
    with pytest.raises(RewardError, match="reward 'scribbler' changed the images in place"):
        score(scorers, IMAGES.clone(), PROMPTS)


def test_a_group_wise_reward_is_evaluated_against_the_base_policy():
    base, brighter = IMAGES[:2] * 0.5, IMAGES[:2]
    scorers = build_scorers([Brighter(), BrightnessReward()], CPU)
    scores, base_scores = HeldOut(scorers, ("one", "two"), base).evaluate(brighter)
    assert list(scores) == list(base_scores) == ["brighter", "brightness"]
    assert scores["brighter"].tolist() == [1.0, 1.0]
    assert base_scores["brighter"].tolist() == [0.0, 0.0]
    assert np.allclose(scores["brightness"], 2 * base_scores["brightness"])


def test_a_report_reads_back_equal_from_json():
    report = StepReport(
        step=3,
        metrics={"reward": 0.1 + 0.2, "gap": float("nan")},
        prompts=(Prompt(4, "a red circle"),),
        counts=np.array([7]),
        selected=np.array([[True, False]]),
        entropy=np.array([[1 / 3, 2.0]]),
        delta=None,
        evaluation=None,
        seconds={"rollout": 0.1},
    )
    again = from_json(to_json(report))
    assert again.metrics["reward"] == report.metrics["reward"]
    assert np.isnan(again.metrics["gap"])
    assert again.prompts == report.prompts
    assert again.counts.dtype == np.int64
    assert again.selected.dtype == np.bool_
    assert np.array_equal(again.entropy, report.entropy)
    assert again.delta is None


@pytest.fixture(scope="module")
def flaky_run(tiny_weights):
    from aegpo.models.shapes import ShapesSpec

    allocator = EntropyAllocator(low=2, high=6)
    return small_experiment(ShapesSpec(weights=tiny_weights), rewards=(Flaky(),), allocator=allocator)


@pytest.fixture(scope="module")
def straight(flaky_run, tmp_path_factory):
    Flaky.left[0] = -1
    return run(flaky_run, tmp_path_factory.mktemp("straight"))


# Calls of a run of 4 steps, evaluated before it and after steps 2 and 4: base, policy, 1, 2, policy, 3, 4, policy
@pytest.mark.parametrize("call", range(8))
def test_a_run_whose_reward_fails_goes_on_as_if_it_had_not(call, flaky_run, straight, tmp_path):
    Flaky.left[0] = call
    with pytest.raises(RewardError, match="ConnectionError: the server is gone") as failure:
        run(flaky_run, tmp_path)
    Flaky.left[0] = -1
    checkpoint = checkpoints.load_latest(tmp_path / "checkpoints")
    saved = {3: 1, 4: 1, 5: 2, 6: 3, 7: 3}.get(call)
    assert (checkpoint and checkpoint.step) == saved
    if call >= 2:
        kept = f"step {saved} and all before it are saved" if saved else "nothing was learned yet"
        assert str(failure.value).endswith(f"\n{kept}; the same command goes on from there")
    engine, recorder, outcome = run(flaky_run, tmp_path)
    assert outcome == "finished"
    assert_same_weights(engine, straight[0])
    for mine, yours in zip(reversed(recorder.reports), reversed(straight[1].reports), strict=False):
        assert_same_report(mine, yours)
    assert len(recorder.reports) == 4 - (saved or 0) + (saved is None)
