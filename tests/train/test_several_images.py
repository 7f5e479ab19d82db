"""Several images of each held-out prompt: their noise, their means, and rewards that compare them."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
import pytest
import torch
from test_engine import assert_same_evaluations, assert_same_report, assert_same_weights, run
from test_scoring import Brighter
from worlds import BrightnessReward, asked, small_experiment

from aegpo.core.experiment import EvaluationSpec
from aegpo.core.parts import ComparedWith
from aegpo.core.sections import CheckpointSpec, OptimizerSpec, PromptsSpec, RolloutsSpec
from aegpo.plugin.manager import load_registries, plugin_manager
from aegpo.prompts.lists import numbered
from aegpo.rewards.diversity import DiversityReward
from aegpo.runs.manifest import experiment_changes
from aegpo.train.engine import Engine
from aegpo.train.held_out import HeldOut, parts, repeated
from aegpo.train.policy import Policy
from aegpo.train.scoring import build_scorers

CPU = torch.device("cpu")
FAST = OptimizerSpec(learning_rate=0.03)


class BrighterAmong(Brighter):
    """The share of the policy's other images of the prompt that are darker."""

    kind: Literal["brighter-among"] = "brighter-among"
    compared_with: ClassVar[ComparedWith] = "own"


def grey(*shades: float) -> torch.Tensor:
    return torch.stack([torch.full((3, 6, 6), shade) for shade in shades])


def experiment(tiny_spec, images: int, **changes):
    evaluation = EvaluationSpec(every=2, images=2, images_per_prompt=images, **changes.pop("evaluation", {}))
    return small_experiment(tiny_spec, evaluation=evaluation, **({"optimizer": FAST} | changes))


# --- noise ------------------------------------------------------------------------------------------------------------


def test_one_more_image_changes_no_noise_of_those_before(tiny_spec):
    policy, prompts = Policy(small_experiment(tiny_spec)), numbered(["a", "b", "a"])
    three, one = policy.evaluation_noise(prompts, 4, 3), policy.evaluation_noise(prompts, 4)
    assert torch.equal(three[::3], one)
    by_prompt = three.unflatten(0, (3, 3))
    assert torch.equal(by_prompt[:, :2].flatten(0, 1), policy.evaluation_noise(prompts, 4, 2))
    assert len(three.flatten(1).unique(dim=0)) == 9, "the second to ask the same has noise of its own"


@pytest.mark.parametrize(
    ("images", "most", "sizes"), [(1, 5, [5]), (1, 2, [2, 2, 1]), (2, 5, [2, 2, 1]), (3, 5, [1] * 5), (9, 5, [1] * 5)]
)
def test_prompts_are_parted_so_that_no_more_images_than_asked_are_there_unless_one_prompt_has_more(images, most, sizes):
    prompts = numbered("abcde")
    found = [*parts(prompts, images, most)]
    assert [len(part) for part in found] == sizes
    assert [prompt for part in found for prompt in part] == [*prompts]
    assert [prompt.text for prompt in repeated(prompts[:2], 3)] == [*"aaabbb"]


# --- scores -----------------------------------------------------------------------------------------------------------


def test_a_score_is_the_mean_over_a_prompts_images_and_the_grid_has_the_first(tiny_spec):
    engine = Engine.build(experiment(tiny_spec, 3))
    found, policy = engine.evaluator.evaluate(), engine.policy
    prompts = numbered(engine.evaluator.prompts)
    noise = policy.evaluation_noise(prompts, images=3).unflatten(0, (len(prompts), 3))
    each = [policy.images(prompts, noise[:, image]) for image in range(3)]
    light = torch.stack([images.mean(dim=(1, 2, 3)) for images in each], dim=1)
    assert found.scores["brightness"] == pytest.approx(light.mean(dim=1).numpy(), abs=1e-6)
    assert found.scores["brightness"].shape == (4,)
    torch.testing.assert_close(found.images, each[0][:2])
    assert np.array_equal(found.scores["brightness"], found.base_scores["brightness"])


def test_one_image_each_is_the_evaluation_of_old_to_the_bit(tiny_spec):
    engine = Engine.build(experiment(tiny_spec, 1))
    found, policy, prompts = engine.evaluator.evaluate(), engine.policy, numbered(engine.evaluator.prompts)
    images = policy.images(prompts, policy.evaluation_noise(prompts))
    assert torch.equal(found.images, images[:2])
    assert np.array_equal(found.scores["brightness"], BrightnessReward().score(images, prompts).double().numpy())


def test_images_are_compared_with_the_policys_own_and_the_bases_with_the_bases():
    prompts, scorers = asked("aabb"), build_scorers([DiversityReward(), BrighterAmong(), BrightnessReward()], CPU)
    held_out = HeldOut(scorers, prompts, lambda _: grey(0, 1, 0.5, 0.75))
    assert held_out.base_scores["diversity"].tolist() == [1.0, 1.0, 0.25, 0.25]
    for _ in range(2):
        scores, base_scores, _ = held_out.evaluate(lambda _: grey(0.5, 0.5, 0.25, 0.75))
        assert list(scores) == list(base_scores) == ["diversity", "brighter-among", "brightness"]
        assert scores["diversity"].tolist() == [0.0, 0.0, 0.5, 0.5]
        assert base_scores["diversity"].tolist() == [1.0, 1.0, 0.25, 0.25]
        assert scores["brighter-among"].tolist() == [0.0, 0.0, 0.0, 1.0]
        assert base_scores["brighter-among"].tolist() == [0.0, 1.0, 0.0, 1.0]


def test_a_reward_that_compares_with_the_base_compares_image_by_image():
    prompts = asked("aabb")
    held_out = HeldOut(build_scorers([Brighter()], CPU), prompts, lambda _: grey(0.5, 0.5, 0.5, 0.5))
    scores, base_scores, _ = held_out.evaluate(lambda _: grey(0.75, 0.25, 1.0, 0.75))
    assert scores["brighter"].tolist() == [1.0, 0.0, 1.0, 1.0]
    assert base_scores["brighter"].tolist() == [0.0, 1.0, 0.0, 0.0]


def test_what_a_list_asks_twice_is_two_groups():
    prompts = repeated(numbered(["a", "a", "b"]), 2)
    held_out = HeldOut(build_scorers([DiversityReward()], CPU), prompts, lambda _: grey(0, 1, 0.5, 0.5, 0, 0.25))
    assert held_out.base_scores["diversity"].tolist() == [1.0, 1.0, 0.0, 0.0, 0.25, 0.25]


# --- runs -------------------------------------------------------------------------------------------------------------


def test_how_prompts_are_parted_changes_no_score(tiny_spec, monkeypatch):
    spec = experiment(tiny_spec, 2, evaluation={"rewards": (DiversityReward(), Brighter())})
    found = Engine.build(spec).evaluator.evaluate()
    monkeypatch.setattr("aegpo.train.held_out.parts", lambda prompts, images, most: parts(prompts, images, 100))
    whole = Engine.build(spec).evaluator.evaluate()
    torch.testing.assert_close(found.images, whole.images)
    for label, scores in found.scores.items():
        assert scores == pytest.approx(whole.scores[label], abs=1e-6)
        assert found.base_scores[label] == pytest.approx(whole.base_scores[label], abs=1e-6)


def test_it_is_trained_on_like_any_reward_and_stop_and_resume_is_the_run_that_never_stopped(tiny_spec, tmp_path):
    spec = experiment(
        tiny_spec,
        2,
        rewards=(BrightnessReward(), DiversityReward(weight=0.5)),
        rollouts=RolloutsSpec(prompts_per_step=2, rollouts_per_step=8, denoising_steps=4, micro_batch=3),
        prompts=PromptsSpec(train_count=4, evaluation_count=3),
        checkpoint=CheckpointSpec(every=3),
    )
    straight, told, _ = run(spec, tmp_path / "straight")
    _, before, _ = run(spec, tmp_path / "broken", stop_after=2)
    resumed, after, _ = run(spec, tmp_path / "broken")
    assert_same_weights(straight, resumed)
    assert_same_evaluations(told, before, after)
    for one, other in zip(told.reports, before.reports + after.reports, strict=True):
        assert_same_report(one, other)
    metrics = told.reports[0].metrics
    assert metrics["reward"] == pytest.approx(metrics["reward/brightness"] + 0.5 * metrics["reward/diversity"])
    assert 0 < metrics["reward/diversity"] < 1
    assert (told.evaluations[4].scores["diversity"] != told.evaluations[0].scores["diversity"]).all()
    assert np.array_equal(told.evaluations[0].scores["diversity"], told.evaluations[4].base_scores["diversity"])


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trained", [True, False])
def test_a_reward_that_compares_a_policys_own_images_needs_two_of_each_prompt(tiny_spec, trained):
    where = {"rewards": (DiversityReward(),)}
    one, two = (
        experiment(tiny_spec, images, **(where if trained else {"evaluation": dict(where)})) for images in (1, 2)
    )
    assert [each.message for each in two.problems()] == []
    (problem,) = one.problems()
    assert problem.location == (("rewards", 0) if trained else ("evaluation", "rewards", 0))
    assert problem.message == (
        "reward 'diversity' compares the images of a prompt with one another, but evaluation paints one of each; "
        "write 'images_per_prompt: 2' or more under 'evaluation'"
    )
    assert [*experiment(tiny_spec, 1, rewards=(Brighter(),)).problems()] == []


def test_a_run_that_was_begun_before_there_were_several_images_is_the_same_experiment(tiny_spec):
    from aegpo.config.loading import parse_experiment
    from aegpo.rewards.palette import PaletteReward

    begun = small_experiment(tiny_spec, rewards=(PaletteReward(),)).model_dump(mode="json")
    assert begun["evaluation"].pop("images_per_prompt") == 1
    found = parse_experiment(begun, load_registries(plugin_manager()))
    assert found.evaluation.images_per_prompt == 1
    assert experiment_changes(found, {"experiment": begun}) == []
