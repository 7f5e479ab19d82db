"""GRPO on one page: its rewards and weights are the engine's, to rounding."""

from __future__ import annotations

import sys

import pytest
import torch
from page_blocks import load
from repository import ROOT

from aegpo.config.loading import load_experiment_file
from aegpo.models.shapes import ShapesSpec
from aegpo.plugin.manager import load_registries, plugin_manager
from aegpo.train.engine import Engine

PROMPTS, GROUP, STEPS, HELD_OUT = 2, 12, 5, 16


@pytest.fixture(scope="module")
def page():
    module = load(ROOT / "docs" / "grpo_on_one_page.py")
    yield module
    del sys.modules[module.__name__]


@pytest.fixture(scope="module")
def learned():
    """The arm of the main job, on fewer and shorter rollouts: the engine, and what two steps reported."""
    rollouts = f"{{prompts_per_step: {PROMPTS}, rollouts_per_step: {PROMPTS * GROUP}, denoising_steps: {STEPS}}}"
    changes = [f"rollouts={rollouts}", f"optimizer.rollouts_per_update={PROMPTS * GROUP // 2}", "device=cpu"]
    changes += ["evaluation.images_per_prompt=1", "evaluation.rewards=[]", f"prompts.evaluation_count={HELD_OUT}"]
    file = load_experiment_file(ROOT / "experiments" / "ablation.yaml", load_registries(plugin_manager()), changes)
    engine = Engine.build(file.experiment("grpo", 0))
    return engine, [engine.step(number) for number in (1, 2)]


def settings(page, **changes):
    """As `engine`."""
    size = {"prompts": PROMPTS, "group": GROUP, "denoising_steps": STEPS, "rollouts_per_update": PROMPTS * GROUP // 2}
    return page.Settings(training_steps=2, **size, **changes)


def test_two_steps_have_the_engines_rewards_and_weights(page, learned):
    engine, reports = learned
    model = ShapesSpec().build(torch.device("cpu"))
    before = {name: weight.detach().clone() for name, weight in model.policy.named_parameters()}
    rewards = page.train(model, settings(page))
    assert rewards == pytest.approx([report.metrics["reward"] for report in reports], abs=1e-6)
    expected = engine.learner.weights.average.values
    off = [(weight.detach() - expected[name]) for name, weight in model.policy.named_parameters()]
    moved = [(expected[name] - weight) for name, weight in before.items()]
    assert max(float(each.abs().max()) for each in off) < 1e-5
    assert norm(off) < 1e-4 * norm(moved)


def test_another_clip_range_would_be_seen(page, learned):
    """The comparison is no empty one: a loss with another clip range ends elsewhere."""
    engine, _ = learned
    model = ShapesSpec().build(torch.device("cpu"))
    page.train(model, settings(page, clip=1e-6))
    expected = engine.learner.weights.average.values
    off = [(weight.detach() - expected[name]) for name, weight in model.policy.named_parameters()]
    assert max(float(each.abs().max()) for each in off) > 1e-5


def test_held_out_captions_are_scored_as_in_a_run(page, learned):
    asked = list(ShapesSpec().captions("evaluation", HELD_OUT, seed=0))
    found = page.held_out(ShapesSpec().build(torch.device("cpu")), asked, settings(page))
    expected = learned[0].evaluator.evaluate()
    assert expected.prompts == tuple(prompt.text for prompt in asked)
    assert 0 < found < 1
    assert found == pytest.approx(expected.base_scores["strict"].mean(), abs=1e-6)


def test_the_numbers_of_the_page_are_those_of_the_file(page):
    file = load_experiment_file(ROOT / "experiments" / "ablation.yaml", load_registries(plugin_manager()))
    spec, ours = file.experiment("grpo", 0), page.Settings()
    assert (ours.training_steps, ours.learning_rate, ours.ema) == (
        spec.training_steps,
        spec.optimizer.learning_rate,
        spec.policy.ema,
    )
    assert (ours.prompts, ours.prompts * ours.group, ours.denoising_steps) == (
        spec.rollouts.prompts_per_step,
        spec.rollouts.rollouts_per_step,
        spec.rollouts.denoising_steps,
    )
    assert ours.rollouts_per_update == spec.optimizer.rollouts_per_update
    assert (ours.noise_level, ours.clip) == (spec.sampler.noise_level, spec.objective.clip)
    assert (ours.train_captions, ours.held_out_captions) == (spec.prompts.train_count, spec.prompts.evaluation_count)


def norm(tensors):
    return float(torch.stack([each.double().square().sum() for each in tensors]).sum().sqrt())
