"""Scores of predicted clean images: what they are, what they cost, and who is blamed."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar, Literal

import numpy as np
import pytest
import torch
from test_engine import assert_same_report, assert_same_weights, run
from torch import Tensor
from worlds import BrightnessReward, GaussianModel, GaussianSpec, asked, execution, plan_of, small_experiment

from aegpo.core.parts import AdvantageSpec, RewardSpec
from aegpo.core.records import Prompt, RolloutPlan
from aegpo.core.sections import CheckpointSpec, OptimizerSpec, RolloutsSpec, TailSpec
from aegpo.errors import ContractError, PlanError, RewardError
from aegpo.method.advantages import DepthAdvantage, GainAdvantage
from aegpo.method.costs import Range, cost
from aegpo.method.planning import problems
from aegpo.method.scored_levels import scored_levels
from aegpo.method.selectors import EntropyPeakSelector
from aegpo.method.trees import BranchingTree, IndependentTree
from aegpo.rewards.palette import PaletteReward
from aegpo.train.engine import Engine
from aegpo.train.noise import StepNoise
from aegpo.train.predicted import PredictedScores
from aegpo.train.rollouts import roll_out
from aegpo.train.scoring import build_scorers

CPU = torch.device("cpu")
MEANS = ["0.5", "-0.5"]
PROMPTS = asked(MEANS)
PLANS = {
    "independent": plan_of(IndependentTree(), [3, 5], [[1, 1, 1, 0], [1, 1, 1, 0]]),
    "branching": plan_of(BranchingTree(noise="all"), [4, 6], [[1, 0, 1, 0], [1, 1, 1, 0]]),
    "prompts in turns": RolloutPlan(
        tuple(np.array([0, 1, 1, 0]) for _ in range(5)),
        tuple(np.arange(4) for _ in range(4)),
        tuple(np.ones(4, dtype=bool) for _ in range(4)),
        tuple(np.ones(4, dtype=bool) for _ in range(4)),
    ),
}


class Linear(GaussianModel):
    """Paints a mean latent of x as grey of 0.5 + x / 20, and notes how many it was asked for."""

    def __init__(self, spec):
        super().__init__(spec)
        self.decoded: list[int] = []

    def decode(self, latents: Tensor) -> Tensor:
        self.decoded.append(len(latents))
        return (0.5 + latents.float() / 20).expand(-1, 3, -1, -1)


class Together(RewardSpec):
    """How much brighter an image is than the prompt's mean; notes which prompts it was asked about at a time."""

    kind: Literal["together"] = "together"
    group_wise: ClassVar[bool] = True
    seen: ClassVar[list[list[str]]] = []

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        self.seen.append([prompt.text for prompt in prompts])
        light = images.mean(dim=(1, 2, 3))
        same = torch.tensor([[one == other for other in prompts] for one in prompts])
        return light - (same * light).sum(dim=1) / same.sum(dim=1)


BRIGHTNESS = (BrightnessReward(),)


def looked(plan, levels, rewards=BRIGHTNESS, micro_batch=64, model=None, prompts=PROMPTS):
    """Rollouts of a plan, the scores of what was predicted, and the size of every evaluation."""
    how = execution(model or Linear(GaussianSpec()), plan.num_steps, micro_batch=micro_batch)
    evaluations: list[int] = []

    def counted(latents, sigma, cond):
        evaluations.append(len(latents))
        return how.velocity(latents, sigma, cond)

    scorers = build_scorers(rewards, CPU)
    predicted = PredictedScores(how, scorers, plan, prompts, np.array(levels, dtype=np.int64), lambda images: None)
    counting = dataclasses.replace(how, velocity=counted)
    cond = how.model.encode(prompts)
    rollouts = roll_out(counting, plan, cond, StepNoise(0), look=predicted.look)
    return rollouts, predicted.beside(torch.zeros(plan.num_rollouts, len(rewards))), evaluations


def expected_brightness(plan: RolloutPlan, rollouts, level: int, spread: float = 0.5) -> Tensor:
    """What a node's image is expected to be, given its state: Tweedie for N(mean, spread^2) in closed form."""
    mean = torch.tensor([float(text) for text in MEANS])[torch.from_numpy(plan.prompt[level])]
    if level == 0:
        return 0.5 + mean / 20  # pure noise says nothing of the image
    assert plan.trained[level - 1].all(), "only states after trained edges are kept"
    state = rollouts.edges.next_latents[rollouts.edges.level == level - 1].mean(dim=(1, 2, 3))
    sigma = 1 - level / plan.num_steps
    shrink = (1 - sigma) * spread**2 / ((1 - sigma) ** 2 * spread**2 + sigma**2)
    return 0.5 + (mean + shrink * (state - (1 - sigma) * mean)) / 20


@pytest.mark.parametrize("micro_batch", [1, 3, 64])
@pytest.mark.parametrize("name", ["independent", "prompts in turns"])
def test_predicted_images_are_the_expected_ones_and_cost_no_evaluation(name, micro_batch):
    plan = PLANS[name]
    rollouts, scores, evaluations = looked(plan, [0, 1, 3], micro_batch=micro_batch)
    assert list(scores.nodes) == [0, 1, 3]
    for level, found in scores.nodes.items():
        expected = expected_brightness(plan, rollouts, level)
        torch.testing.assert_close(found[:, 0], expected, atol=1e-6, rtol=0)
    assert sum(evaluations) == plan.forwards
    without, _, _ = looked(plan, [], micro_batch=micro_batch)
    assert torch.equal(rollouts.latents, without.latents)  # who looks changes nothing
    assert torch.equal(rollouts.edges.log_prob, without.edges.log_prob)


def test_the_gain_of_a_linear_reward_is_what_the_step_added_to_the_expected_image():
    plan = plan_of(IndependentTree(), [3, 5], [[1, 1, 1, 1], [1, 1, 1, 1]])
    advantage = GainAdvantage(std="none", clip=None)
    rollouts, scores, _ = looked(plan, advantage.levels(plan).tolist())
    final = 0.5 + rollouts.latents.mean(dim=(1, 2, 3)) / 20
    path = [expected_brightness(plan, rollouts, level) for level in range(4)] + [final]
    gains = torch.stack([after - before for before, after in pairwise(path)])
    group = torch.from_numpy(plan.group)
    means = torch.stack([gains[:, group == prompt].mean(dim=1) for prompt in (0, 1)], dim=1)
    expected = (gains - means[:, group]).flatten()
    scores = dataclasses.replace(scores, leaves=final[:, None])
    found = advantage.estimate(scores, torch.ones(1), rollouts)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("micro_batch", [1, 3, 64])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_only_levels_that_are_asked_for_are_decoded_in_micro_batches(plan, micro_batch):
    model = Linear(GaussianSpec())
    looked(plan, [], micro_batch=micro_batch, model=model)
    assert sum(model.decoded) == plan.num_rollouts
    model.decoded.clear()
    _, scores, _ = looked(plan, [2], micro_batch=micro_batch, model=model)
    assert sum(model.decoded) == plan.num_rollouts + len(plan.prompt[2])
    assert max(model.decoded) <= micro_batch
    assert scores.nodes[2].shape == (len(plan.prompt[2]), 1)


@pytest.mark.parametrize("micro_batch", [1, 3, 64])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_a_reward_that_compares_gets_whole_groups_and_the_same_scores_in_any_micro_batches(plan, micro_batch):
    Together.seen.clear()
    rewards = (BrightnessReward(), Together())
    _, scores, _ = looked(plan, [1, 3], rewards, micro_batch)
    sizes = {text: [int((plan.prompt[level] == row).sum()) for level in (1, 3)] for row, text in enumerate(MEANS)}
    assert len(Together.seen) == 4  # two prompts at two levels, each once
    for text, counts in sizes.items():
        assert sorted(len(call) for call in Together.seen if set(call) == {text}) == sorted(counts)
    for level in (1, 3):
        light, compared = scores.nodes[level].unbind(dim=1)
        for row in range(2):
            group = torch.from_numpy(plan.prompt[level] == row)
            torch.testing.assert_close(compared[group], light[group] - light[group].mean(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("micro_batch", [1, 64])
def test_images_of_a_prompt_that_a_step_asks_twice_are_compared_as_those_of_its_rollouts_are(micro_batch):
    plan, prompts = plan_of(IndependentTree(), [2, 3, 2], [[1, 1, 0]] * 3), asked(["0.5", "-0.5", "0.5"])
    Together.seen.clear()
    (_, scores, _) = looked(plan, [1], (BrightnessReward(), Together()), micro_batch, prompts=prompts)
    light, compared = scores.nodes[1].unbind(dim=1)
    rows = torch.from_numpy(plan.prompt[1] != 1)
    torch.testing.assert_close(compared[rows], light[rows] - light[rows].mean(), atol=1e-6, rtol=0)
    assert sorted(len(call) for call in Together.seen) == [3, 4]


def test_images_are_scored_before_the_next_are_painted_and_do_not_wait_for_each_other():
    events: list[str] = []
    painted: list[weakref.ref[Tensor]] = []
    predicted: list[weakref.ref[Tensor]] = []

    class Noting(BrightnessReward):
        def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
            events.append(f"scored {len(images)}")
            assert all(earlier() is None for earlier in predicted)  # none that was scored is kept
            predicted.append(painted[-1])
            return super().score(images, prompts)

    class Painting(Linear):
        def decode(self, latents: Tensor) -> Tensor:
            events.append(f"painted {len(latents)}")
            images = super().decode(latents)
            painted.append(weakref.ref(images))
            return images

    plan = PLANS["independent"]
    looked(plan, [2], (Noting(),), micro_batch=3, model=Painting(GaussianSpec()))
    at_level = [event for event in pairwise(events) if event[1].startswith("scored")]
    assert at_level == [("painted 3", "scored 3"), ("painted 3", "scored 3"), ("painted 2", "scored 2")]


# --- in a run --------------------------------------------------------------------------------------------------------

GAIN = {"advantage": GainAdvantage(), "training_steps": 2, "checkpoint": CheckpointSpec(every=1)}
TREE = {
    "tree": BranchingTree(),
    "selector": EntropyPeakSelector(top_k=2),
    "rollouts": RolloutsSpec(prompts_per_step=2, rollouts_per_step=8, denoising_steps=4, micro_batch=3),
}
KINDS = {
    "side by side": {},
    "tree": TREE,
    "two rewards, one that compares": {
        "rewards": (BrightnessReward(), Together(weight=0.5)),
        "advantage": GainAdvantage(combine="per-reward", std="prompt"),
    },
}


def test_predicted_images_are_counted_where_tails_make_the_plans_of_an_arm_unequally_long(tiny_spec):
    """Peaks at the first or the last steps: levels 0 to 2 or 3 to 5, of which a short plan has none."""
    rollouts = RolloutsSpec(prompts_per_step=2, rollouts_per_step=8, denoising_steps=6, tail=TailSpec())
    experiment = small_experiment(tiny_spec, **GAIN, selector=EntropyPeakSelector(top_k=2), rollouts=rollouts)
    planned = cost(experiment).predicted
    assert planned.high == 6 * 8
    assert planned.low <= Engine.build(experiment).step(1).metrics["predicted_images"] <= planned.high


@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)
def test_a_run_with_gains_that_stops_and_goes_on_is_the_run_that_never_stopped(tiny_spec, tmp_path, changes):
    optimizer = OptimizerSpec(learning_rate=0.01)
    experiment = small_experiment(tiny_spec, **(GAIN | {"optimizer": optimizer} | changes))
    straight, told, _ = run(experiment, tmp_path / "straight")
    torch.manual_seed(1)
    _, before, _ = run(experiment, tmp_path / "broken", stop_after=1)
    resumed, after, _ = run(experiment, tmp_path / "broken")
    assert_same_weights(straight, resumed)
    reports = before.reports + after.reports
    assert [report.step for report in reports] == [1, 2]
    for one, other in zip(told.reports, reports, strict=True):
        assert_same_report(one, other)
    planned = cost(experiment).predicted
    for report in told.reports:
        assert planned.low <= report.metrics["predicted_images"] <= planned.high
        assert report.metrics["grad_norm"] > 0


def test_a_step_without_predictions_says_nothing_of_them():
    experiment = small_experiment(GaussianSpec())
    assert "predicted_images" not in Engine.build(experiment).step(1).metrics
    assert cost(experiment).predicted == Range(0, 0)


def test_predicted_images_are_counted_and_work_is_what_it_was():
    plain, gain = (cost(small_experiment(GaussianSpec(), **changes)) for changes in ({}, GAIN))
    assert gain.predicted == Range(4 * 8, 4 * 8)  # before steps 0 to 2, and after the last of them
    assert (gain.work, gain.forwards) == (plain.work, plain.forwards)


class Twilight(BrightnessReward):
    """Fails in a way of its own at the first images it is shown, which are those predicted before the first step."""

    what: str = "nan"

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        light = super().score(images, prompts)
        if self.what == "raise":
            raise ConnectionError("the server is gone")
        return light[:-1] if self.what == "fewer" else light * float("nan")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("nan", "reward 'brightness' returned a non-finite score for prompt "),
        ("fewer", "reward 'brightness' returned scores of shape (7,), float32; (8,), float32 was asked"),
        ("raise", "reward 'brightness' failed with ConnectionError: the server is gone"),
    ],
)
def test_a_reward_that_fails_on_what_is_predicted_is_blamed_by_name(what, message):
    engine = Engine.build(small_experiment(GaussianSpec(), rewards=(Twilight(what=what),), **GAIN))
    with pytest.raises(RewardError) as caught:
        engine.step(1)
    assert str(caught.value).startswith(message)


class Glaring(GaussianSpec):
    """Paints whiter than white where its latents are alike, as they are predicted from noise."""

    def build(self, device):
        class Model(GaussianModel):
            def decode(self, latents: Tensor) -> Tensor:
                alike = latents.flatten(1).std(dim=1) < 1e-3
                return super().decode(latents) + 2.0 * (alike & (latents[:, 0, 0, 0] != 0)).view(-1, 1, 1, 1)

        return Model(self)


def test_a_model_that_paints_no_image_of_what_it_predicts_is_blamed():
    Engine.build(small_experiment(Glaring())).step(2)  # the rollouts' own are fine
    with pytest.raises(ContractError, match=r"model 'gaussian' decoded pixels from .*; images lie in \[0, 1\]"):
        Engine.build(small_experiment(Glaring(), **GAIN)).step(2)


def test_a_reward_that_compares_is_refused_where_a_prompt_has_one_image():
    experiment = small_experiment(GaussianSpec(), rewards=(Together(),), tree=BranchingTree(), **GAIN)
    (problem,) = [each for each in problems(experiment) if not each.warning]
    assert problem.location == ("advantage",)
    assert problem.message.startswith(
        "reward 'together' compares the images of one prompt, but at level 0, which advantage 'gain' wants scored, "
        "prompt 0 of the step has a single node; choose tree 'independent' with 'start: own'"
    )
    with pytest.raises(PlanError, match="has a single node"):
        Engine.build(experiment).step(1)


# --- foreign advantages ----------------------------------------------------------------------------------------------


class Old(AdvantageSpec):
    """Of the first edition: takes a tensor of scores."""

    kind: Literal["old"] = "old"
    how: str = "double"

    def estimate(self, rewards, weights, rollouts):
        score = {
            "double": lambda: rewards.double() @ weights.double(),
            "shape": lambda: rewards.shape[0] * weights,
            "times": lambda: (rewards * weights).sum(dim=1),
            "matrix": lambda: rewards @ weights,
            "column": lambda: rewards[:, 0],
            "length": lambda: torch.zeros(len(rewards)),
            "function": lambda: torch.mean(rewards, dim=1),
            "copy": lambda: torch.as_tensor(rewards)[:, 0],
        }[self.how]()
        return score[torch.from_numpy(np.concatenate(rollouts.plan.first_leaf[1:]))]


class OldBuilt(Old):
    """Of the first edition, with a part of its own."""

    kind: Literal["old-built"] = "old-built"  # type: ignore[assignment]

    def build(self):
        class Part:
            def estimate(self, rewards, weights, rollouts):
                return rewards.mean(dim=1)

        return Part()


HOW = ("double", "shape", "times", "matrix", "column", "length", "function", "copy")


@pytest.mark.parametrize("how", HOW)
def test_an_advantage_that_takes_a_tensor_is_told_what_to_take(how):
    with pytest.raises(ContractError) as caught:
        Engine.build(small_experiment(GaussianSpec(), advantage=Old(how=how))).step(1)
    assert str(caught.value).startswith("advantage 'old' failed with ")
    told = "; it was written for aegpo 0.1, whose advantages took a tensor of scores: use scores.leaves"
    assert str(caught.value).endswith(told)
    assert caught.value.location == ("advantage",)


def test_a_built_advantage_of_the_first_edition_is_told_so_when_the_file_is_checked():
    experiment = small_experiment(GaussianSpec(), advantage=OldBuilt())
    (problem,) = [each for each in problems(experiment) if not each.warning]
    assert problem.location == ("advantage",)
    assert problem.message == (
        "advantage 'old-built' has no levels(plan): it was written for aegpo 0.1, whose advantages took a tensor of "
        "scores; use scores.leaves in estimate(scores, weights, rollouts), and let levels(plan) return an empty array "
        "of int64"
    )


class Misspelt(DepthAdvantage):
    """Knows the record, but not its field."""

    def estimate(self, scores, weights, rollouts):
        return scores.leafs


def test_a_misspelt_field_is_not_taken_for_the_first_edition():
    with pytest.raises(ContractError, match=r"failed with AttributeError: 'Scores' object has no attribute 'leafs'$"):
        Engine.build(small_experiment(GaussianSpec(), advantage=Misspelt())).step(1)


@pytest.mark.parametrize("levels", [[0], np.array([0, 4]), np.array([-1]), np.array([1, 1]), np.array([1.0])])
def test_levels_that_are_none_of_the_plan_are_refused_by_name(levels):
    class Astray(GainAdvantage):
        def levels(self, plan):
            return levels

    experiment = small_experiment(GaussianSpec(), advantage=Astray())
    with pytest.raises(
        ContractError, match=r"^advantage 'gain' asked for levels .*; an array of int64 is right, each "
    ):
        scored_levels(experiment, experiment.advantage, PLANS["independent"])


def test_levels_come_in_order_whatever_the_order_they_were_asked_in():
    class Backwards(GainAdvantage):
        def levels(self, plan):
            return super().levels(plan)[::-1].copy()

    experiment = small_experiment(GaussianSpec(), advantage=Backwards())
    assert scored_levels(experiment, experiment.advantage, PLANS["independent"]).tolist() == [0, 1, 2, 3]


def test_the_embedded_worlds_own_reward_scores_what_is_predicted(tiny_spec):
    experiment = small_experiment(tiny_spec, rewards=(PaletteReward(),), **GAIN)
    assert Engine.build(experiment).step(1).metrics["predicted_images"] == 32
