"""The entropy probe: what it measures along a trajectory, what its options cost and change, and what it remembers."""

from __future__ import annotations

import dataclasses
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from worlds import Asked, GaussianSpec, execution, plan_of

from aegpo.attention.entropy import measure_call
from aegpo.core.records import AttentionCall, Prompt
from aegpo.core.signals import Trunk
from aegpo.errors import AegpoError, CheckpointError
from aegpo.method.samplers import euler
from aegpo.method.signals import EntropySignal
from aegpo.method.signals.base_entropies import BaseCurves
from aegpo.method.signals.entropy_probe import EntropyProbe
from aegpo.method.trees import BranchingTree, IndependentTree
from aegpo.models.loaded import fingerprint
from aegpo.train.noise import StepNoise, prompt_noise
from aegpo.train.rollouts import roll_out

PROMPTS = tuple(
    Prompt(index, text)
    for index, text in enumerate(("a red circle", "two blue squares and a green triangle", "three red circles"))
)
STEPS = 4


def dense(query, key, scale: float) -> torch.Tensor:
    """Entropy of softmax(scale q k^T) in float64 with the matrix in memory."""
    weights = (scale * query.double() @ key.double().transpose(-2, -1)).softmax(dim=-1)
    return torch.special.entr(weights).sum(dim=-1)


class Probed:
    """A probe of a model, and what it measured."""

    def __init__(self, model, spec: EntropySignal, micro_batch: int = 64, storage=torch.float32) -> None:
        self.probe = EntropyProbe(spec)
        self.policy = Asked(execution(model, STEPS, micro_batch=micro_batch, storage=storage))

    def measure(self, step, prompts) -> SimpleNamespace:
        found = self.probe.measure(step, prompts, self.policy)
        base = self.probe.base_entropies(prompts)
        return SimpleNamespace(
            entropy=found.values["entropy"],
            delta=found.values["entropy-delta"],
            base_entropy=base,
            forwards=found.forwards,
            trunk=found.trunk,
        )


def probe_of(model, micro_batch: int = 64, **spec) -> Probed:
    return Probed(model, EntropySignal(**spec), micro_batch)


def encoded(model, prompts=PROMPTS):
    return model.encode(prompts)


def measure(probe, model, prompts=PROMPTS, step: int = 1):
    return probe.measure(step, prompts)


def perturb(model) -> None:
    """Moves every weight of the policy a little, away from its base."""
    with model.frozen("base"):
        pass
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.policy.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=generator))


# --- the exact probe -------------------------------------------------------------------------------------------------


def test_the_probe_measures_every_layer_along_the_deterministic_trajectory(tiny_model):
    probed = measure(probe_of(tiny_model, seed=4), tiny_model)
    assert probed.entropy.shape == probed.base_entropy.shape == (3, STEPS)
    assert probed.entropy.dtype == np.float64
    assert probed.forwards == 2 * 3 * STEPS
    assert probed.trunk is None
    start = prompt_noise(tiny_model.latent_shape, 4, PROMPTS, "signal", 0)
    latents, sigmas, cond = start, tiny_model.sigmas(STEPS), encoded(tiny_model)
    for level in range(STEPS):
        calls: list[AttentionCall] = []
        sigma = sigmas[level].expand(3)
        with torch.no_grad(), tiny_model.tap_attention(calls.append):
            velocity = tiny_model.velocity(latents, sigma, cond)
        layers = [dense(call.query, call.key, call.scale).mean(dim=(1, 2)) for call in calls]
        assert len(layers) == 2
        np.testing.assert_allclose(probed.entropy[:, level], torch.stack(layers).mean(dim=0).numpy(), atol=2e-6)
        latents = euler(latents, velocity, sigma, sigmas[level + 1].expand(3))


@pytest.mark.parametrize("block", ["joint", "image-image", "image-text", "text-image", "text-text"])
def test_every_block_of_a_joint_attention_can_be_read(tiny_model, block):
    found = measure(probe_of(tiny_model, block=block), tiny_model).entropy
    calls: list[AttentionCall] = []
    noise = prompt_noise(tiny_model.latent_shape, 0, PROMPTS, "signal", 0)
    with torch.no_grad(), tiny_model.tap_attention(calls.append):
        tiny_model.velocity(noise, torch.ones(3), encoded(tiny_model))
    expected = torch.stack([measure_call(call, [block])[block].entropy.mean(dim=1) for call in calls]).mean(dim=0)
    np.testing.assert_allclose(found[:, 0], expected.numpy(), atol=1e-6)


def test_delta_is_the_mean_distance_from_the_base_over_the_measured_steps(tiny_model):
    probe = probe_of(tiny_model, steps=(0, 2))
    measure(probe, tiny_model)
    perturb(tiny_model)
    moved = measure(probe, tiny_model, step=2)
    expected = np.abs(moved.entropy - moved.base_entropy)[:, [0, 2]].mean(axis=1)
    assert np.array_equal(moved.delta, expected)
    assert (expected > 1e-4).all()


def test_before_training_the_policy_is_the_base_and_every_delta_is_exactly_zero(tiny_model):
    probed = measure(probe_of(tiny_model), tiny_model)
    assert np.array_equal(probed.entropy, probed.base_entropy)


def test_the_base_is_measured_once_for_each_prompt(tiny_model):
    probe = probe_of(tiny_model)
    before = measure(probe, tiny_model, PROMPTS[:2])
    perturb(tiny_model)
    moved = measure(probe, tiny_model, PROMPTS[:2], step=2)
    assert (before.forwards, moved.forwards) == (4 * STEPS, 2 * STEPS)
    assert np.array_equal(before.base_entropy, moved.base_entropy)
    assert (np.abs(moved.entropy - moved.base_entropy).mean(axis=1) > 1e-4).all()
    mixed = measure(probe, tiny_model, step=3)
    assert mixed.forwards == STEPS * (3 + 1)
    assert np.array_equal(mixed.base_entropy[:2], before.base_entropy)


def test_prompts_are_known_by_their_index_and_one_that_comes_twice_is_measured_once(tiny_model):
    probe = probe_of(tiny_model)
    first = measure(probe, tiny_model)
    again = measure(probe, tiny_model, (PROMPTS[2], PROMPTS[0], PROMPTS[0]), step=2)
    assert again.forwards == 2 * STEPS
    assert np.array_equal(again.base_entropy, first.base_entropy[[2, 0, 0]])
    assert np.array_equal(again.entropy[1], again.entropy[2])


def test_the_start_noise_of_a_prompt_is_the_same_at_every_step_of_a_run(tiny_model):
    one = measure(probe_of(tiny_model), tiny_model, PROMPTS[1:2])
    both = measure(probe_of(tiny_model), tiny_model)
    np.testing.assert_allclose(one.entropy[0], both.entropy[1], atol=1e-5)
    other = measure(probe_of(tiny_model, seed=1), tiny_model)
    assert np.abs(other.entropy - both.entropy).max() > 1e-4


def test_the_probe_draws_nothing_from_the_global_generators(tiny_model):
    torch.manual_seed(0)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    measure(probe_of(tiny_model, rows=8), tiny_model)
    assert torch.equal(torch.get_rng_state(), before)
    assert np.random.get_state()[1].tolist() == numpy_before


def test_small_batches_measure_what_one_large_batch_does(tiny_model):
    whole, parts = (measure(probe_of(tiny_model, micro_batch=size), tiny_model) for size in (64, 2))
    np.testing.assert_allclose(whole.entropy, parts.entropy, atol=1e-5)


# --- options against the exact probe ---------------------------------------------------------------------------------


def test_steps_that_are_not_measured_are_nan_and_the_trajectory_ends_after_the_last_one(tiny_model):
    exact = measure(probe_of(tiny_model), tiny_model)
    some = measure(probe_of(tiny_model, steps=(2, 0)), tiny_model)
    assert some.forwards == 2 * 3 * 3
    assert np.array_equal(some.entropy[:, [0, 2]], exact.entropy[:, [0, 2]])
    assert np.isnan(some.entropy[:, [1, 3]]).all()
    assert np.isnan(some.base_entropy[:, [1, 3]]).all()


def test_rows_are_a_sample_of_the_exact_measure_and_the_same_at_every_step_of_a_run(tiny_model):
    exact, sampled = (measure(probe_of(tiny_model, rows=rows), tiny_model) for rows in ("all", 25))
    assert np.abs(exact.entropy - sampled.entropy).max() < 0.05
    assert not np.array_equal(exact.entropy, sampled.entropy)
    assert np.array_equal(sampled.entropy, sampled.base_entropy)  # the same rows: differences are of the policy alone
    assert np.array_equal(measure(probe_of(tiny_model, rows=50), tiny_model).entropy, exact.entropy)


def test_layers_are_chosen_by_pattern_and_their_mean_is_the_whole(tiny_model):
    exact = measure(probe_of(tiny_model), tiny_model).entropy
    each = [
        measure(probe_of(tiny_model, layers=(f"transformer_blocks.{layer}.*",)), tiny_model).entropy for layer in (0, 1)
    ]
    assert np.abs(each[0] - each[1]).max() > 1e-3
    np.testing.assert_allclose(np.mean(each, axis=0), exact, atol=1e-6)


@pytest.mark.parametrize(("stride", "levels"), [(2, (0, 2)), (3, (0, 3))])
def test_a_stride_follows_fewer_longer_steps_and_interpolates_between_them(tiny_model, stride, levels):
    found = measure(probe_of(tiny_model, stride=stride), tiny_model)
    assert found.forwards == 3 * (EntropySignal(stride=stride).cost(STEPS).policy * 2) == 2 * 3 * len(levels)
    latents, sigmas, cond = (
        prompt_noise(tiny_model.latent_shape, 0, PROMPTS, "signal", 0),
        tiny_model.sigmas(STEPS),
        encoded(tiny_model),
    )
    sides = []
    for level, following in zip(levels, (*levels[1:], STEPS), strict=True):
        calls: list[AttentionCall] = []
        with torch.no_grad(), tiny_model.tap_attention(calls.append):
            velocity = tiny_model.velocity(latents, sigmas[level].expand(3), cond)
        sides.append(torch.stack([dense(c.query, c.key, c.scale).mean(dim=(1, 2)) for c in calls]).mean(dim=0).numpy())
        latents = euler(latents, velocity, sigmas[level].expand(3), sigmas[following].expand(3))
    shares = np.minimum(np.arange(STEPS) / stride, 1)[:, None]  # the last measured value is held
    expected = (1 - shares) * sides[0] + shares * sides[1]
    np.testing.assert_allclose(found.entropy, expected.T, atol=2e-6)


def test_delta_with_a_stride_is_the_mean_over_the_interpolated_curve(tiny_model):
    probe = probe_of(tiny_model, stride=2, samples=2)
    measure(probe, tiny_model)
    perturb(tiny_model)
    moved = measure(probe, tiny_model, step=2)
    assert moved.forwards == 3 * 2 * 2
    assert np.array_equal(moved.delta, np.abs(moved.entropy - moved.base_entropy).mean(axis=1))
    assert (moved.delta > 1e-4).all()


def test_with_a_stride_the_base_on_the_policys_latents_costs_what_is_measured(tiny_model):
    found = measure(probe_of(tiny_model, stride=2, base_on="policy"), tiny_model)
    assert found.forwards == 2 * 3 * 2
    assert not np.isnan(found.base_entropy).any()
    assert np.array_equal(found.entropy, found.base_entropy)


def test_with_a_stride_rollouts_take_over_level_0_alone(tiny_model):
    trunk = measure(probe_of(tiny_model, source="rollout", stride=2), tiny_model).trunk
    plan = TREES["late splits"]
    assert trunk.levels(plan).tolist() == [1, 1, 1]
    assert EntropySignal(source="rollout", stride=2).cost(STEPS).trunk == 1
    counted, calls = counting(execution(tiny_model, STEPS))
    found = roll_out(counted, plan, encoded(tiny_model), StepNoise(0), trunk=trunk)
    assert sum(calls) == plan.forwards - 3
    alone = Trunk(trunk.prompt, trunk.noise)
    expected = roll_out(execution(tiny_model, STEPS), plan, encoded(tiny_model), StepNoise(0), trunk=alone)
    torch.testing.assert_close(found.images, expected.images, atol=2e-5, rtol=0)


def test_another_stride_keeps_its_base_in_another_folder(tiny_model, tmp_path):
    for stride in (1, 2):
        probe = probe_of(tiny_model, stride=stride)
        probe.probe.open(tmp_path, 0, KEY)
        measure(probe, tiny_model)
        probe.probe.write(1)
    assert len(list(tmp_path.iterdir())) == 2


def test_samples_are_further_start_noises_whose_curves_are_averaged(tiny_model):
    probe = probe_of(tiny_model, samples=3)
    found = measure(probe, tiny_model)
    assert found.forwards == 3 * 2 * 3 * STEPS
    first = measure(probe_of(tiny_model), tiny_model)
    assert np.abs(found.entropy - first.entropy).max() > 1e-4
    noises = [prompt_noise(tiny_model.latent_shape, 0, PROMPTS[:1], "signal", sample)[0] for sample in range(3)]
    assert len({float(noise.sum()) for noise in noises}) == 3
    curves = []
    for sample in range(3):
        calls: list[AttentionCall] = []
        with torch.no_grad(), tiny_model.tap_attention(calls.append):
            tiny_model.velocity(noises[sample][None], torch.ones(1), encoded(tiny_model, PROMPTS[:1]))
        curves.append(np.mean([float(dense(c.query, c.key, c.scale).mean()) for c in calls]))
    assert found.entropy[0, 0] == pytest.approx(np.mean(curves), abs=1e-5)


def test_a_curve_holds_for_as_many_training_steps_as_refresh_says(tiny_model):
    probe = probe_of(tiny_model, refresh=3)
    first = measure(probe, tiny_model, PROMPTS[:2], step=1)
    perturb(tiny_model)
    kept = measure(probe, tiny_model, step=3)  # prompts 0 and 1 are 2 steps old, prompt 2 is new
    assert kept.forwards == 2 * STEPS
    assert np.array_equal(kept.entropy[:2], first.entropy)
    again = measure(probe, tiny_model, step=4)
    assert again.forwards == 2 * STEPS
    assert (np.abs(again.entropy[:2] - first.entropy).max(axis=1) > 1e-4).all()
    assert np.array_equal(again.entropy[2], kept.entropy[2])


# --- what rollouts take over -----------------------------------------------------------------------------------------


def counting(how):
    calls: list[int] = []

    def velocity(latents, sigma, cond):
        calls.append(len(latents))
        return how.velocity(latents, sigma, cond)

    return dataclasses.replace(how, velocity=velocity), calls


TREES = {
    "late splits": plan_of(BranchingTree(), [4, 4, 4], [[0, 1, 1, 0], [0, 0, 1, 1], [1, 1, 0, 0]]),
    "two trees": plan_of(BranchingTree(), [3, 4, 4], [[0, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]),
    "shared start": plan_of(IndependentTree(start="shared"), [2, 3, 2], [[0, 1, 0, 0], [0, 0, 1, 0], [1, 0, 0, 0]]),
    "noise from the start": plan_of(BranchingTree(noise="all"), [4] * 3, [[0, 1, 1, 0]] * 3),
    "own starts": plan_of(IndependentTree(), [2, 3, 2], [[0, 1, 0, 0]] * 3),
}
SAVED = {
    "late splits": 2 + 3 + 1,
    "two trees": 3 + 3,
    "shared start": 2 + 3 + 1,
    "noise from the start": 3,
    "own starts": 0,
}


@pytest.mark.parametrize("name", TREES)
def test_a_tree_that_starts_from_the_probe_is_the_same_tree_for_fewer_evaluations(tiny_model, name):
    plan, how, cond = TREES[name], execution(tiny_model, STEPS), encoded(tiny_model)
    perturb(tiny_model)
    trunk = measure(probe_of(tiny_model, source="rollout"), tiny_model).trunk
    assert trunk is not None
    assert trunk.saved(plan) == SAVED[name]
    counted, calls = counting(how)
    found = roll_out(counted, plan, cond, StepNoise(0), trunk=trunk)
    assert sum(calls) == plan.forwards - SAVED[name]
    bare, all_calls = counting(how)
    noise_alone = Trunk(trunk.prompt, trunk.noise)
    expected = roll_out(bare, plan, cond, StepNoise(0), trunk=noise_alone)
    assert sum(all_calls) == plan.forwards
    torch.testing.assert_close(found.images, expected.images, atol=2e-5, rtol=0)
    torch.testing.assert_close(found.edges.log_prob, expected.edges.log_prob, atol=1e-4, rtol=1e-4)
    if name == "own starts":
        assert torch.equal(found.images, roll_out(how, plan, cond, StepNoise(0)).images)


def test_a_trunk_ends_where_the_probe_does(tiny_model):
    trunk = measure(probe_of(tiny_model, source="rollout", steps=(0, 1)), tiny_model).trunk
    plan = TREES["late splits"]
    assert trunk.levels(plan).tolist() == [2, 2, 1]
    counted, calls = counting(execution(tiny_model, STEPS))
    roll_out(counted, plan, encoded(tiny_model), StepNoise(0), trunk=trunk)
    assert sum(calls) == plan.forwards - 5


def test_only_what_was_measured_in_this_step_is_a_trunk(tiny_model):
    probe = probe_of(tiny_model, source="rollout", refresh=5)
    assert measure(probe, tiny_model, PROMPTS[:2]).trunk.prompt.tolist() == [0, 1]
    assert measure(probe, tiny_model, step=2).trunk.prompt.tolist() == [2]
    assert measure(probe, tiny_model, step=3).trunk is None


def test_a_trunk_in_half_precision_storage_is_the_rollouts_own_trajectory(tiny_model):
    how = execution(tiny_model, STEPS, storage=torch.bfloat16)
    cond, plan = encoded(tiny_model), TREES["late splits"]
    probe = Probed(tiny_model, EntropySignal(source="rollout"), storage=torch.bfloat16)
    trunk = probe.measure(1, PROMPTS).trunk
    found = roll_out(how, plan, cond, StepNoise(0), trunk=trunk)
    expected = roll_out(how, plan, cond, StepNoise(0), trunk=Trunk(trunk.prompt, trunk.noise))
    torch.testing.assert_close(found.images, expected.images, atol=1e-2, rtol=0)


# --- what is remembered ----------------------------------------------------------------------------------------------

KEY = {"model": "tiny"}
FOUR, SEVEN = Prompt(4, "four"), Prompt(7, "seven")


def opened(folder, step: int, key=KEY) -> BaseCurves:
    base = BaseCurves()
    base.open(folder, step, key)
    return base


def test_the_base_on_disk_is_taken_back_bit_for_bit(tiny_model, tmp_path):
    probe = probe_of(tiny_model)
    probe.probe.open(tmp_path, 0, KEY)
    first = measure(probe, tiny_model, PROMPTS[:2], step=1)
    probe.probe.write(10)
    second = measure(probe, tiny_model, step=11)
    probe.probe.write(20)
    perturb(tiny_model)

    late = probe_of(tiny_model)
    late.probe.open(tmp_path, 20, KEY)
    again = measure(late, tiny_model, step=21)
    assert again.forwards == 3 * STEPS
    assert np.array_equal(again.base_entropy, second.base_entropy)

    early = probe_of(tiny_model)  # of an older checkpoint: what came later is forgotten, and measured again
    early.probe.open(tmp_path, 10, KEY)
    assert np.array_equal(early.probe.base_entropies(PROMPTS[:2]), first.base_entropy)
    assert measure(early, tiny_model, step=11).forwards == (3 + 1) * STEPS


def test_what_was_measured_after_the_checkpoint_is_left_for_the_next_one(tmp_path):
    base = opened(tmp_path, 0)
    base.add(9, [FOUR], np.ones((1, 2)))
    base.add(10, [SEVEN], np.zeros((1, 2)))
    base.write(9)
    assert opened(tmp_path, 9).missing([FOUR, SEVEN]) == [1]
    base.write(10)
    assert np.array_equal(opened(tmp_path, 10).get([FOUR, SEVEN]), [[1, 1], [0, 0]])
    assert opened(tmp_path, 8).missing([FOUR, SEVEN]) == [0, 1]


def test_a_prompt_of_another_text_is_another_one_though_its_place_is_the_same(tmp_path):
    base = opened(tmp_path, 0)
    base.add(1, [FOUR], np.ones((1, 2)))
    base.write(1)
    assert opened(tmp_path, 1).missing([Prompt(4, "for"), FOUR]) == [0]


def test_another_model_or_probe_reads_another_folder(tmp_path):
    base = opened(tmp_path, 0)
    base.add(1, [FOUR], np.ones((1, 3)))
    base.write(1)
    assert opened(tmp_path, 1, {"model": "other"}).missing([FOUR]) == [0]


def test_a_file_that_is_damaged_or_of_another_probe_is_refused(tmp_path):
    base = opened(tmp_path, 0)
    base.add(1, [FOUR], np.ones((1, 3)))
    base.write(1)
    (path,) = tmp_path.rglob("*.safetensors")
    other = opened(tmp_path, 1, {"model": "other"})
    other.add(1, [FOUR], np.ones((1, 3)))
    other.write(1)
    (theirs,) = (each for each in tmp_path.rglob("*.safetensors") if each != path)
    path.write_bytes(theirs.read_bytes())
    with pytest.raises(CheckpointError, match="holds entropies of another probe; put it back"):
        opened(tmp_path, 1)
    path.write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match=r"step-000001\.safetensors is damaged \(.*\); put it back"):
        opened(tmp_path, 1)


def test_networks_are_told_apart_by_their_weights(tiny_model):
    before = fingerprint(tiny_model.policy)
    assert fingerprint(tiny_model.policy) == before
    perturb(tiny_model)
    assert fingerprint(tiny_model.policy) != before


def test_curves_that_still_hold_are_part_of_the_state(tiny_model):
    probe = probe_of(tiny_model, refresh=3)
    first = measure(probe, tiny_model, PROMPTS[:2])
    restored = probe_of(tiny_model, refresh=3)
    restored.probe.load_state_dict(probe.probe.state_dict())
    perturb(tiny_model)
    again = measure(restored, tiny_model, PROMPTS[:2], step=2)
    assert np.array_equal(again.entropy, first.entropy)
    exact = probe_of(tiny_model)
    measure(exact, tiny_model)
    assert exact.probe.state_dict().keys() == {"known"}
    exact.probe.load_state_dict({})


# --- what cannot be measured -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", ["self", "cross"])
def test_a_block_the_network_does_not_have_is_refused(tiny_model, block):
    with pytest.raises(AegpoError) as error:
        measure(probe_of(tiny_model, block=block), tiny_model)
    assert str(error.value) == (
        f"signals.entropy: the network has no {block!r} attention in these layers; it has joint, image-image, "
        "image-text, text-image, text-text"
    )


def test_a_pattern_that_matches_no_layer_is_refused_with_the_layers(tiny_model):
    with pytest.raises(AegpoError) as error:
        measure(probe_of(tiny_model, layers=("blocks.*", "mid*")), tiny_model)
    assert str(error.value) == (
        "signals.entropy: no layer matches 'blocks.*', 'mid*'; layers are transformer_blocks.0.attn, "
        "transformer_blocks.1.attn"
    )


@pytest.mark.parametrize("stray", ["transformer_blocks.7.*", ""])
def test_each_pattern_matches_a_layer_or_is_refused_beside_one_that_does(tiny_model, stray):
    with pytest.raises(AegpoError, match=f"no layer matches '{re.escape(stray)}'; layers are transformer_blocks.0"):
        measure(probe_of(tiny_model, layers=("transformer_blocks.0.*", stray)), tiny_model)


def test_a_network_without_softmax_attention_is_refused():
    model = GaussianSpec().build(torch.device("cpu"))
    with pytest.raises(AegpoError) as error:
        measure(probe_of(model), model, [Prompt(0, "0.5")])
    assert str(error.value) == (
        "signals.entropy: the network made no softmax attention call that can be watched, so it has no attention "
        "entropy; choose parts that read none"
    )
