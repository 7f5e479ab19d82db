"""The tool that asks whether training steps agree on a direction before anything is learned."""

from __future__ import annotations

import sys

import pytest
import torch
from repository import ROOT

from aegpo.config.loading import load_experiment_file
from aegpo.plugin.manager import load_registries, plugin_manager
from aegpo.train.engine import Engine

sys.path.insert(0, str(ROOT / "tools"))

from gradient_agreement import agreement, gradients, main


def test_the_mean_cosine_is_that_of_all_pairs_whatever_the_lengths():
    axes = torch.eye(3)
    assert agreement(torch.stack([axes[0], 5 * axes[0], 2 * axes[0]])) == (pytest.approx(1), pytest.approx(0))
    cosine, error = agreement(torch.stack([axes[0], axes[1], axes[2]]))
    assert (cosine, error) == (0, 0)
    cosine, _ = agreement(torch.stack([axes[0], axes[0], -axes[0]]))
    assert cosine == pytest.approx((1 - 1 - 1) / 3)


def test_the_gradients_are_those_that_steps_of_the_base_would_learn_from(tiny_weights, tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(
        f"model: {{kind: shapes, weights: '{tiny_weights}'}}\nrewards: [palette]\ndevice: cpu\n"
        "rollouts: {prompts_per_step: 2, rollouts_per_step: 8, denoising_steps: 3}\n"
        "prompts: {train_count: 8, evaluation_count: 2}\n"
        "optimizer: {kind: sgd, learning_rate: 0.5, max_grad_norm: null, weight_decay: 0}\n"
    )
    experiment = load_experiment_file(path, load_registries(plugin_manager())).arms["main"]
    found, rewards = gradients(experiment, 3)
    engine = Engine.build(experiment)
    before = [weight.detach().clone() for weight in engine.policy.weights.trained.values()]
    report = engine.step(1)
    moved = [old - weight.detach() for old, weight in zip(before, engine.policy.weights.trained.values(), strict=True)]
    assert rewards[0] == pytest.approx(report.metrics["reward"])
    torch.testing.assert_close(torch.cat([each.flatten() for each in moved]), 0.5 * found[0], rtol=1e-3, atol=1e-6)


def test_it_prints_the_cosine_of_an_arm(tiny_weights, monkeypatch, capsys):
    small = ["rollouts.prompts_per_step=2", "rollouts.rollouts_per_step=24", "optimizer.rollouts_per_update=24"]
    small += [f"model.weights={tiny_weights}", "prompts.train_count=8", "prompts.evaluation_count=2", "device=cpu"]
    options = [word for pair in small for word in ("--set", pair)]
    file = str(ROOT / "experiments" / "ablation.yaml")
    monkeypatch.setattr(sys, "argv", ["gradient_agreement.py", file, "--arm", "grpo", "--steps", "3", *options])
    main()
    assert "grpo: mean cosine of the gradients of 3 steps" in capsys.readouterr().out
