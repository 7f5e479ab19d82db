"""Delta-entropy: what it is the mean of, and on whose latents the base policy is measured for it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_probe import KEY, PROMPTS, STEPS, encoded, measure, perturb, probe_of

from aegpo.attention.entropy import measure_call
from aegpo.core.records import AttentionCall
from aegpo.errors import SettingError
from aegpo.method.samplers import euler
from aegpo.method.signals.entropy_options import entropy_change
from aegpo.train.noise import prompt_noise

POLICY_CURVE, BASE_CURVE = np.array([[3.0, 1.0], [2.0, 2.0]]), np.array([[2.0, 2.0], [1.0, 4.0]])


@pytest.mark.parametrize(
    ("how", "expected"), [("absolute", [1.0, 1.5]), ("signed", [0.0, -0.5]), ("relative", [0.0, 0.25])]
)
def test_delta_is_the_mean_over_steps_of_a_difference_its_size_or_its_share(how, expected):
    assert entropy_change(POLICY_CURVE, BASE_CURVE, how).tolist() == expected


def test_nothing_is_relative_to_an_entropy_of_zero():
    with pytest.raises(SettingError, match=r"^signals\.entropy\.delta: the base policy's entropy is 0 at a measured"):
        entropy_change(POLICY_CURVE, np.zeros((2, 2)), "relative")
    assert entropy_change(POLICY_CURVE, np.zeros((2, 2)), "absolute").tolist() == [2.0, 2.0]


@pytest.mark.parametrize("how", ["absolute", "signed", "relative"])
def test_the_probe_measures_the_delta_that_is_asked(tiny_model, how):
    probe = probe_of(tiny_model, delta=how)
    assert measure(probe, tiny_model).delta.tolist() == [0.0, 0.0, 0.0]
    perturb(tiny_model)
    moved = measure(probe, tiny_model, step=2)
    assert np.array_equal(moved.delta, entropy_change(moved.entropy, moved.base_entropy, how))


def test_on_the_policys_latents_the_base_is_measured_along_the_policys_trajectory(tiny_model):
    perturb(tiny_model)
    probed = measure(probe_of(tiny_model, base_on="policy"), tiny_model)
    latents, sigmas = prompt_noise(tiny_model.latent_shape, 0, PROMPTS, "signal", 0), tiny_model.sigmas(STEPS)
    for level in range(STEPS):
        calls: list[AttentionCall] = []
        sigma = sigmas[level].expand(3)
        with torch.no_grad():
            with tiny_model.frozen("base"), tiny_model.tap_attention(calls.append):
                tiny_model.velocity(latents, sigma, encoded(tiny_model))
            velocity = tiny_model.velocity(latents, sigma, encoded(tiny_model))
        layers = [measure_call(call, ["joint"])["joint"].entropy.mean(dim=1) for call in calls]
        np.testing.assert_allclose(probed.base_entropy[:, level], torch.stack(layers).mean(dim=0).numpy(), atol=2e-6)
        latents = euler(latents, velocity, sigma, sigmas[level + 1].expand(3))
    own = measure(probe_of(tiny_model), tiny_model)
    assert np.array_equal(own.entropy, probed.entropy)
    assert np.array_equal(own.base_entropy[:, 0], probed.base_entropy[:, 0])  # both begin with the same noise
    assert (own.base_entropy[:, 1:] != probed.base_entropy[:, 1:]).all()


def test_a_policy_that_is_the_base_has_not_moved_on_its_own_latents(tiny_model):
    probed = measure(probe_of(tiny_model, base_on="policy", rows=5, samples=2), tiny_model)
    assert probed.delta.tolist() == [0.0, 0.0, 0.0]


def test_a_base_on_the_policys_latents_is_measured_at_every_visit_and_only_where_it_is_asked(tiny_model, tmp_path):
    probe = probe_of(tiny_model, base_on="policy", steps=(1, 3), samples=2)
    probe.probe.open(tmp_path, 0, KEY)
    trajectory, there = 2 * STEPS, 2 * 2
    assert measure(probe, tiny_model).forwards == 3 * (trajectory + there)
    assert measure(probe, tiny_model, step=2).forwards == 3 * (trajectory + there)
    probe.probe.write(2)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_base_on_the_policys_latents_holds_as_long_as_the_curve_it_belongs_to(tiny_model):
    perturb(tiny_model)
    probe = probe_of(tiny_model, base_on="policy", refresh=2)
    first = measure(probe, tiny_model)
    restored = probe_of(tiny_model, base_on="policy", refresh=2)
    restored.probe.load_state_dict(probe.probe.state_dict())
    again = measure(restored, tiny_model, step=2)
    assert again.forwards == 0
    assert np.array_equal(again.base_entropy, first.base_entropy)
    assert np.array_equal(again.delta, first.delta)
    assert measure(restored, tiny_model, step=3).forwards == 2 * 3 * STEPS


def test_what_delta_is_does_not_move_what_is_kept_of_the_base(tiny_model, tmp_path):
    first = probe_of(tiny_model)
    first.probe.open(tmp_path, 0, KEY)
    measure(first, tiny_model)
    first.probe.write(1)
    other = probe_of(tiny_model, delta="relative")
    other.probe.open(tmp_path, 1, KEY)
    assert measure(other, tiny_model, step=2).forwards == 3 * STEPS
