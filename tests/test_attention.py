"""Watching a network's attention: everything is seen, nothing is changed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel
from torch import nn

from aegpo.attention import watch_attention
from aegpo.interfaces import AttentionCall
from aegpo.layouts import Site, Tokens
from aegpo.learning import add_adapters
from aegpo.models.shapes import ShapesSpec
from aegpo.specs import PolicySpec

CAPTIONS = ["a red circle", "two blue squares and a green triangle"]
LAYERS = ["transformer_blocks.0.attn", "transformer_blocks.1.attn"]


def inputs(model):
    latents = torch.randn((2, *model.latent_shape), generator=torch.Generator().manual_seed(0))
    return latents, torch.tensor([0.9, 0.3]), model.encode(CAPTIONS)


def watched(model) -> tuple[torch.Tensor, list[AttentionCall]]:
    calls: list[AttentionCall] = []
    with torch.no_grad(), model.tap_attention(calls.append):
        return model.velocity(*inputs(model)), calls


def test_the_output_is_bit_equal_with_and_without_a_tap(tiny_model):
    with torch.no_grad():
        plain = tiny_model.velocity(*inputs(tiny_model))
    output, _ = watched(tiny_model)
    assert torch.equal(output, plain)


def test_every_layer_is_seen_once_with_its_tokens(tiny_model):
    _, calls = watched(tiny_model)
    assert [call.layer for call in calls] == LAYERS
    for call in calls:
        assert call.query.shape == call.key.shape == (2, 2, 36 + 14, 8)
        assert (call.image, call.text) == (slice(0, 36), slice(36, 50))
        assert call.scale == pytest.approx(8**-0.5)
        assert not call.query.requires_grad


def test_captured_queries_and_keys_are_those_after_qk_norm(tiny_model):
    given: list[tuple[torch.Tensor, torch.Tensor]] = []
    attention = tiny_model.policy.transformer_blocks[0].attn

    def remember(module, args, kwargs):
        given.append((kwargs["hidden_states"], kwargs["encoder_hidden_states"]))

    handle = attention.register_forward_pre_hook(remember, with_kwargs=True)
    _, calls = watched(tiny_model)
    handle.remove()
    ((image, text),) = given

    def heads(values):
        return values.unflatten(-1, (2, 8)).transpose(1, 2)

    with torch.no_grad():
        query = [attention.norm_q(heads(attention.to_q(image)))]
        query.append(attention.norm_added_q(heads(attention.add_q_proj(text))))
        key = [attention.norm_k(heads(attention.to_k(image)))]
        key.append(attention.norm_added_k(heads(attention.add_k_proj(text))))
    assert torch.equal(calls[0].query, torch.cat(query, dim=2))
    assert torch.equal(calls[0].key, torch.cat(key, dim=2))


def test_the_network_is_left_as_it_was_even_if_the_tap_fails(tiny_model):
    def hooks() -> int:
        return sum(
            len(module._forward_pre_hooks) + len(module._forward_hooks) for module in tiny_model.policy.modules()
        )

    def fail(call):
        raise KeyError(call.layer)

    before = hooks()
    with pytest.raises(KeyError, match=LAYERS[0]), torch.no_grad(), tiny_model.tap_attention(fail):
        tiny_model.velocity(*inputs(tiny_model))
    assert hooks() == before
    _, calls = watched(tiny_model)
    assert [call.layer for call in calls] == LAYERS


def test_gradients_flow_through_a_watched_network(tiny_model):
    calls: list[AttentionCall] = []
    with tiny_model.tap_attention(calls.append):
        tiny_model.velocity(*inputs(tiny_model)).sum().backward()
    watched_gradient = tiny_model.policy.transformer_blocks[0].attn.to_q.weight.grad.clone()
    tiny_model.policy.zero_grad()
    tiny_model.velocity(*inputs(tiny_model)).sum().backward()
    assert torch.equal(tiny_model.policy.transformer_blocks[0].attn.to_q.weight.grad, watched_gradient)
    assert len(calls) == 2


def test_the_base_is_watched_inside_base_and_the_policy_outside(tiny_model):
    with tiny_model.base():
        pass
    with torch.no_grad():
        for weight in tiny_model.policy.transformer_blocks[0].attn.to_q.parameters():
            weight.mul_(-1)
    _, policy = watched(tiny_model)
    with tiny_model.base():
        _, base = watched(tiny_model)
    assert [call.layer for call in base] == LAYERS
    assert torch.equal(base[0].query[:, :, :36], -policy[0].query[:, :, :36])


def test_adapters_are_part_of_what_is_seen(tiny_model):
    _, before = watched(tiny_model)
    add_adapters(tiny_model.policy, PolicySpec(train="lora", rank=2, alpha=2))
    with torch.no_grad():
        for name, weight in tiny_model.policy.named_parameters():
            if "lora_B" in name:
                weight.fill_(0.5)
    _, adapted = watched(tiny_model)
    assert [call.layer for call in adapted] == LAYERS
    assert not torch.equal(adapted[0].query, before[0].query)
    with tiny_model.base():
        _, base = watched(tiny_model)
    assert torch.equal(base[0].query, before[0].query)


def test_guidance_shows_both_branches_and_not_the_text_encoder(tiny_weights):
    model = ShapesSpec(weights=tiny_weights, guidance=3.0).build(torch.device("cpu"))
    _, calls = watched(model)
    assert [call.layer for call in calls] == LAYERS * 2


class Block(nn.Module):
    """An attention with a processor that passes its arguments in the given way."""

    def __init__(self, call):
        super().__init__()
        self.processor = call

    def forward(self, query, key):
        return self.processor(query, key)


@pytest.mark.parametrize(
    "call",
    [
        lambda q, k: F.scaled_dot_product_attention(q, k, k, scale=0.25),
        lambda q, k: F.scaled_dot_product_attention(query=q, key=k, value=k, scale=0.25),
        lambda q, k: F.scaled_dot_product_attention(q, k, k, None, 0.0, False, scale=0.25),
    ],
)
def test_arguments_are_understood_however_they_are_passed(call):
    network = nn.ModuleDict({"attn": Block(call)})
    query, key = torch.randn(1, 2, 6, 4), torch.randn(1, 2, 3, 4)
    calls: list[AttentionCall] = []

    def layout(site: Site) -> Tokens:
        return Tokens("cross", slice(0, site.queries), slice(0, site.keys))

    with watch_attention(network, calls.append, layout):
        network["attn"](query, key)
    (seen,) = calls
    assert seen.layer == "attn"
    assert seen.scale == 0.25
    assert torch.equal(seen.query, query)
    assert torch.equal(seen.key, key)
    assert (seen.image, seen.text) == (slice(0, 6), slice(0, 3))


def test_the_image_only_attention_of_a_dual_block_is_told_from_the_joint_one(tiny_weights, tiny_model):
    config = {**tiny_model.policy.config, "dual_attention_layers": (0,)}
    network = SD3Transformer2DModel.from_config(config).eval()
    calls: list[AttentionCall] = []
    latents, sigma, cond = inputs(tiny_model)
    with torch.no_grad(), watch_attention(network, calls.append):
        network(latents, cond.text, cond.pooled, sigma * 1000)
    found = {call.layer: (call.query.shape[2], call.text.stop - call.text.start) for call in calls}
    assert found == {
        "transformer_blocks.0.attn": (50, 14),
        "transformer_blocks.0.attn2": (36, 0),
        "transformer_blocks.1.attn": (50, 14),
    }
