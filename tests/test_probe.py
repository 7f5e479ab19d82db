"""The entropy probe: what it measures along a trajectory, and what it remembers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from worlds import GaussianSpec

from aegpo.errors import AegpoError
from aegpo.interfaces import AttentionCall, Prompt
from aegpo.probe import EntropyProbe, call_entropy
from aegpo.samplers import euler
from aegpo.specs import ProbeSpec

PROMPTS = tuple(
    Prompt(index, text)
    for index, text in enumerate(("a red circle", "two blue squares and a green triangle", "three red circles"))
)


def dense(query, key, scale: float) -> torch.Tensor:
    """Entropy of softmax(scale q k^T) in float64 with the matrix in memory."""
    weights = (scale * query.double() @ key.double().transpose(-2, -1)).softmax(dim=-1)
    return torch.special.entr(weights).sum(dim=-1)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


IMAGE, TEXT = slice(0, 36), slice(36, 50)


def joint_call(batch: int = 2) -> AttentionCall:
    """A joint attention of 36 image and 14 text tokens."""
    return AttentionCall("layer", "joint", normal(batch, 2, 50, 8), normal(batch, 2, 50, 8, seed=1), 0.35, IMAGE, TEXT)


@pytest.mark.parametrize(
    ("block", "rows", "keys"),
    [("joint", slice(None), slice(None)), ("image-text", IMAGE, TEXT), ("image-image", IMAGE, IMAGE)],
)
def test_a_block_is_its_rows_with_the_softmax_over_its_keys(block, rows, keys):
    call = joint_call()
    found = call_entropy(call, ProbeSpec(block=block))
    expected = dense(call.query[:, :, rows], call.key[:, :, keys], call.scale).mean(dim=(1, 2))
    torch.testing.assert_close(found.double(), expected, atol=3e-6, rtol=0)


def test_every_block_belongs_to_the_layers_that_have_it():
    text = slice(36, 36)
    calls = {
        "joint": joint_call(),
        "self": AttentionCall("layer", "self", normal(1, 2, 36, 8), normal(1, 2, 36, 8), 0.35, IMAGE, text),
        "cross": AttentionCall("layer", "cross", normal(1, 2, 36, 8), normal(1, 2, 14, 8), 0.35, IMAGE, slice(0, 14)),
    }
    kind_of = {"joint": "joint", "image-text": "joint", "image-image": "joint", "self": "self", "cross": "cross"}
    for block, kind in kind_of.items():
        measured = {name for name, call in calls.items() if call_entropy(call, ProbeSpec(block=block)) is not None}
        assert measured == {kind}


@pytest.mark.parametrize(("block", "total"), [("joint", 50), ("image-text", 36)])
@pytest.mark.parametrize("rows", [1, 2, 7, 36])
def test_a_subsample_measures_evenly_spaced_rows(block, total, rows):
    call = joint_call()
    chosen = np.linspace(0, total - 1, rows).round().astype(int).tolist() if rows < total else list(range(total))
    keys = slice(None) if block == "joint" else TEXT
    every = dense(call.query[:, :, :total], call.key[:, :, keys], call.scale)
    found = call_entropy(call, ProbeSpec(block=block, rows=rows))
    torch.testing.assert_close(found.double(), every[:, :, chosen].mean(dim=(1, 2)), atol=3e-6, rtol=0)


def test_more_rows_than_there_are_measure_all_of_them():
    call = joint_call()
    assert torch.equal(call_entropy(call, ProbeSpec(rows=51)), call_entropy(call, ProbeSpec()))


def probe_of(model, **spec) -> EntropyProbe:
    return EntropyProbe(model, ProbeSpec(**spec), model.sigmas(3))


def encoded(model, prompts=PROMPTS):
    return model.encode([prompt.text for prompt in prompts])


def perturb(model) -> None:
    """Moves every weight of the policy a little."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.policy.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=generator))


def test_the_probe_measures_every_layer_along_the_deterministic_trajectory(tiny_model):
    entropy, base, forwards = probe_of(tiny_model, seed=4).measure(PROMPTS, encoded(tiny_model))
    assert entropy.shape == base.shape == (3, 3)
    assert entropy.dtype == np.float64
    assert forwards == 2 * 3 * 3
    start = [
        torch.randn(tiny_model.latent_shape, generator=torch.Generator().manual_seed(4 * 1_000_003 + i))
        for i in range(3)
    ]
    latents, sigmas, cond = torch.stack(start), tiny_model.sigmas(3), encoded(tiny_model)
    for level in range(3):
        calls: list[AttentionCall] = []
        sigma = sigmas[level].expand(3)
        with torch.no_grad(), tiny_model.tap_attention(calls.append):
            velocity = tiny_model.velocity(latents, sigma, cond)
        layers = [dense(call.query, call.key, call.scale).mean(dim=(1, 2)) for call in calls]
        assert len(layers) == 2
        np.testing.assert_allclose(entropy[:, level], torch.stack(layers).mean(dim=0).numpy(), atol=2e-6)
        latents = euler(latents, velocity, sigma, sigmas[level + 1].expand(3))


def test_before_training_the_policy_is_the_base_and_every_delta_is_exactly_zero(tiny_model):
    entropy, base, _ = probe_of(tiny_model).measure(PROMPTS, encoded(tiny_model))
    assert np.array_equal(entropy, base)


def test_the_base_is_measured_once_for_each_prompt(tiny_model):
    probe = probe_of(tiny_model)
    with tiny_model.base():
        pass
    _, before, first = probe.measure(PROMPTS[:2], encoded(tiny_model, PROMPTS[:2]))
    perturb(tiny_model)
    moved, cached, second = probe.measure(PROMPTS[:2], encoded(tiny_model, PROMPTS[:2]))
    assert (first, second) == (12, 6)
    assert np.array_equal(before, cached)
    assert (np.abs(moved - cached).mean(axis=1) > 1e-4).all()
    _, mixed, third = probe.measure(PROMPTS, encoded(tiny_model))
    assert third == 3 * (3 + 1)
    assert np.array_equal(mixed[:2], before)


def test_prompts_are_known_by_their_index_whatever_their_order(tiny_model):
    probe = probe_of(tiny_model)
    _, base, _ = probe.measure(PROMPTS, encoded(tiny_model))
    order = (PROMPTS[2], PROMPTS[0], PROMPTS[0])
    _, again, forwards = probe.measure(order, encoded(tiny_model, order))
    assert forwards == 9
    assert np.array_equal(again, base[[2, 0, 0]])


def test_the_start_noise_of_a_prompt_is_the_same_at_every_step_of_a_run(tiny_model):
    one, _, _ = probe_of(tiny_model).measure(PROMPTS[1:2], encoded(tiny_model, PROMPTS[1:2]))
    both, _, _ = probe_of(tiny_model).measure(PROMPTS, encoded(tiny_model))
    np.testing.assert_allclose(one[0], both[1], atol=1e-5)
    other, _, _ = probe_of(tiny_model, seed=1).measure(PROMPTS, encoded(tiny_model))
    assert np.abs(other - both).max() > 1e-4


def test_the_probe_draws_nothing_from_the_global_generators(tiny_model):
    torch.manual_seed(0)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    probe_of(tiny_model).measure(PROMPTS, encoded(tiny_model))
    assert torch.equal(torch.get_rng_state(), before)
    assert np.random.get_state()[1].tolist() == numpy_before


def test_a_restored_probe_remembers_the_base_bit_for_bit(tiny_model):
    probe = probe_of(tiny_model)
    _, base, _ = probe.measure(PROMPTS, encoded(tiny_model))
    restored = probe_of(tiny_model)
    restored.load_state_dict(probe.state_dict())
    with tiny_model.base():
        pass
    perturb(tiny_model)
    _, again, forwards = restored.measure(PROMPTS, encoded(tiny_model))
    assert forwards == 9
    assert np.array_equal(again, base)


def test_an_empty_probe_restores_to_an_empty_one(tiny_model):
    probe = probe_of(tiny_model)
    assert probe.state_dict() == {}
    probe.measure(PROMPTS[:1], encoded(tiny_model, PROMPTS[:1]))
    probe.load_state_dict({})
    assert probe.state_dict() == {}


@pytest.mark.parametrize(("which", "block"), [("tiny", "self"), ("tiny", "cross"), ("gaussian", "joint")])
def test_a_block_the_network_does_not_have_is_refused(tiny_model, which, block):
    model = tiny_model if which == "tiny" else GaussianSpec().build(torch.device("cpu"))
    prompts = PROMPTS if which == "tiny" else [Prompt(0, "0.5")]
    with pytest.raises(AegpoError) as error:
        probe_of(model, block=block).measure(prompts, encoded(model, prompts))
    assert str(error.value) == (
        f"probe: the network has no {block!r} softmax attention to measure; choose another 'block' (joint, image-text, "
        "image-image for transformers such as SD3; self, cross for UNets)"
    )
