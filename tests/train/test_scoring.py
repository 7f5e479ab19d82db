"""Rewards in a run: in lanes, blamed by name, and failing without the loss of anything that was learned."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
import pytest
import torch
from test_engine import assert_same_report, assert_same_weights, run
from torch import Tensor
from worlds import BrightnessReward, asked, small_experiment

from aegpo.core.parts import RewardSpec
from aegpo.core.records import Prompt
from aegpo.core.sections import RolloutsSpec
from aegpo.errors import RewardError
from aegpo.method.allocators import EntropyAllocator
from aegpo.runs import checkpoints
from aegpo.train.held_out import HeldOut
from aegpo.train.scoring import Scoring, build_scorers, score

CPU = torch.device("cpu")
IMAGES = torch.rand((4, 3, 6, 6), generator=torch.Generator().manual_seed(0))
PROMPTS = asked(("one", "two", "one", "two"))


class Meeting(RewardSpec):
    """Scores only once another reward scores at the same time."""

    kind: Literal["meeting"] = "meeting"
    place: str = ""
    barrier: ClassVar[threading.Barrier] = threading.Barrier(2, timeout=10)

    @property
    def lane(self) -> str:
        return self.place

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        self.barrier.wait()
        return images.mean(dim=(1, 2, 3))


class Scribbler(BrightnessReward):
    """Blackens the images it is given."""

    @property
    def lane(self) -> str:
        return "elsewhere"

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return images.zero_().mean(dim=(1, 2, 3))


class Brighter(RewardSpec):
    """The share of the other images of the prompt that are darker."""

    kind: Literal["brighter"] = "brighter"
    group_wise: ClassVar[bool] = True

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        light = images.mean(dim=(1, 2, 3))
        same = torch.tensor([[one == other for other in prompts] for one in prompts])
        return ((light[:, None] > light) & same).sum(1).float() / (same.sum(1) - 1)


class Flaky(BrightnessReward):
    """Fails at one call, counted over the life of the process."""

    left: ClassVar[list[int]] = [-1]

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
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


class Noted(BrightnessReward):
    """Somewhere else, and notes how many images it was asked about at a time."""

    micro_batch: int = 1
    place: str = "elsewhere"
    at_once: int = 1
    asked: ClassVar[list[int]] = []

    @property
    def lane(self) -> str:
        return self.place

    @property
    def early(self) -> int:
        return self.at_once

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        self.asked.append(len(prompts))
        return super().score(images, prompts)


class NotedBrighter(Brighter):
    """Somewhere else, and notes the prompts it was asked about at a time."""

    seen: ClassVar[list[list[str]]] = []

    @property
    def lane(self) -> str:
        return "elsewhere"

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        self.seen.append([prompt.text for prompt in prompts])
        return super().score(images, prompts)


def scored_early(
    specs: Sequence[RewardSpec], images: Tensor, prompts: Sequence[Prompt], size: int
) -> dict[str, Tensor]:
    """Scores of images that are shown in parts."""
    with Scoring(build_scorers(specs, CPU), prompts) as scoring:
        for part in torch.split(images, size):
            scoring.show(part)
        return scoring.finish(images)


@pytest.mark.parametrize(
    ("spec", "at_once"),
    [
        (Noted(), [3, 3, 1]),
        (Noted(micro_batch=2), [2, 4, 1]),
        (Noted(micro_batch=4), [4, 3]),
        (Noted(micro_batch=32), [7]),
        (Noted(at_once=0), [7]),  # it does not want to be asked early
        (Noted(place="cpu"), [7]),  # the run's own device has other things to do until all images are there
        (Noted(place=""), [7]),
    ],
    ids=["one by one", "micro-batches", "larger ones", "all in one", "late", "own device", "no lane"],
)
def test_a_reward_elsewhere_is_asked_in_whole_micro_batches_as_images_are_shown(spec, at_once):
    images, prompts = torch.rand((7, 3, 6, 6), generator=torch.Generator().manual_seed(1)), asked("abcdefg")
    Noted.asked.clear()
    found = scored_early([spec, BrightnessReward(name="here")], images, prompts, 3)
    assert Noted.asked == at_once
    assert list(found) == ["brightness", "here"]
    assert torch.equal(found["brightness"], found["here"])


def test_a_group_wise_reward_elsewhere_is_asked_once_a_prompt_is_complete():
    images, prompts = torch.rand((6, 3, 6, 6), generator=torch.Generator().manual_seed(1)), asked("abacbc")
    NotedBrighter.seen.clear()
    found = scored_early([NotedBrighter()], images, prompts, 1)
    assert NotedBrighter.seen == [["a", "a"], ["b", "b"], ["c", "c"]]
    assert torch.equal(found["brighter"], score(build_scorers([Brighter()], CPU), images, prompts)["brighter"])


def test_a_reward_elsewhere_scores_while_others_are_painted_and_as_often_at_once_as_it_says():
    Meeting.barrier.reset()

    class Server(Meeting):
        @property
        def early(self) -> int:
            return 2

    with Scoring(build_scorers([Server(place="there")], CPU), PROMPTS) as scoring:
        scoring.show(IMAGES[:1])
        scoring.show(IMAGES[1:2])  # the two meet now, or never
        while Meeting.barrier.n_waiting:
            pass
        scoring.show(IMAGES[2:3])
        scoring.show(IMAGES[3:])
        found = scoring.finish(IMAGES)
    assert torch.equal(found["meeting"], IMAGES.mean(dim=(1, 2, 3)))


def test_a_reward_that_fails_early_ends_the_painting_and_is_asked_no_more():
    class Broken(Noted):
        def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
            super().score(images, prompts)
            raise ConnectionError("the server is gone")

    def paint_one_after_the_other() -> None:
        with Scoring(build_scorers([Broken(name="broken")], CPU), asked(["a"] * 1000)) as scoring:
            for _ in range(1000):
                shown.append(1)
                scoring.show(IMAGES[:1])
                time.sleep(0.01)

    Noted.asked.clear()
    shown: list[int] = []
    with pytest.raises(RewardError, match="reward 'broken' failed with ConnectionError: the server is gone"):
        paint_one_after_the_other()
    assert len(Noted.asked) <= len(shown) < 1000


def test_a_run_whose_reward_is_elsewhere_is_the_run_whose_reward_is_here(tiny_weights, tmp_path):
    from aegpo.models.shapes import ShapesSpec

    rollouts = RolloutsSpec(prompts_per_step=2, rollouts_per_step=8, denoising_steps=4, micro_batch=3)
    common = {"rollouts": rollouts, "allocator": EntropyAllocator(low=2, high=6)}
    model = ShapesSpec(weights=tiny_weights)
    here, there = (
        run(small_experiment(model, rewards=(reward,), **common), tmp_path / place)
        for place, reward in (("here", BrightnessReward()), ("there", Noted(micro_batch=2)))
    )
    assert_same_weights(here[0], there[0])
    for mine, yours in zip(here[1].reports, there[1].reports, strict=True):
        assert_same_report(mine, yours)


def test_a_group_wise_reward_is_evaluated_against_the_base_policy():
    base, brighter = IMAGES[:2] * 0.5, IMAGES[:2]
    scorers = build_scorers([Brighter(), BrightnessReward()], CPU)
    scores, base_scores, images = HeldOut(scorers, asked(("one", "two")), lambda _: base).evaluate(lambda _: brighter)
    assert images is brighter
    assert list(scores) == list(base_scores) == ["brighter", "brightness"]
    assert scores["brighter"].tolist() == [1.0, 1.0]
    assert base_scores["brighter"].tolist() == [0.0, 0.0]
    assert np.allclose(scores["brightness"], 2 * base_scores["brightness"])


def test_a_held_out_prompt_that_comes_twice_is_compared_pair_by_pair():
    base = torch.stack([torch.full((3, 6, 6), shade) for shade in (0.5, 0.1, 0.3)])
    painted = torch.stack([torch.full((3, 6, 6), shade) for shade in (0.6, 0.05, 0.2)])
    held_out = HeldOut(build_scorers([Brighter()], CPU), asked(("one", "one", "two")), lambda _: base)
    scores, base_scores, _ = held_out.evaluate(lambda _: painted)
    assert scores["brighter"].tolist() == [1.0, 0.0, 0.0]
    assert base_scores["brighter"].tolist() == [0.0, 1.0, 1.0]


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
    saved = {3: 1, 4: 2, 5: 2, 6: 3, 7: 4}.get(call)
    assert (checkpoint and checkpoint.step) == saved
    if call >= 2:
        kept = f"step {saved} and all before it are saved" if saved else "nothing was learned yet"
        assert str(failure.value).endswith(f"\n{kept}; the same command goes on from there")
    engine, recorder, outcome = run(flaky_run, tmp_path)
    assert outcome == "finished"
    assert_same_weights(engine, straight[0])
    for mine, yours in zip(reversed(recorder.reports), reversed(straight[1].reports), strict=False):
        assert_same_report(mine, yours)
    assert len(recorder.reports) == 4 - (saved or 0)
    due = [0, 2, 4] if call < 3 else [2, 4] if call < 5 else [4]  # one that failed is made up for first
    assert list(recorder.evaluations) == due
