"""What a tap sees on a network of each family: its own attention, exactly, and nothing changed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from networks import NETWORKS, Small

from aegpo.attention.entropy import blocks_of, measure_call
from aegpo.attention.tap import watch_attention
from aegpo.core.records import AttentionCall

FAMILIES = pytest.mark.parametrize("small", NETWORKS, ids=lambda small: small.name)


def output_of(network, inputs) -> torch.Tensor:
    with torch.no_grad():
        output = network(**inputs, return_dict=False)[0]
    return torch.stack(output) if isinstance(output, list) else output


@FAMILIES
def test_tapped_queries_and_keys_give_the_attention_of_the_network_bit_for_bit(small: Small, monkeypatch):
    network, inputs = small.build(), small.inputs()
    plain = output_of(network, inputs)
    calls: list[AttentionCall] = []
    given: list[tuple[torch.Tensor, torch.Tensor]] = []
    original = F.scaled_dot_product_attention

    def remember(query, key, value, *args, **kwargs):
        output = original(query, key, value, *args, **kwargs)
        given.append((value, output))
        return output

    with watch_attention(network, calls.append):
        watched = output_of(network, inputs)
    assert torch.equal(watched, plain)
    monkeypatch.setattr(F, "scaled_dot_product_attention", remember)
    assert torch.equal(output_of(network, inputs), plain)
    assert len(calls) == len(given) > 0
    for call, (value, output) in zip(calls, given, strict=True):
        scores = call.scale * call.query.double() @ call.key.double().transpose(-2, -1)
        if call.mask is not None and call.mask.dtype == torch.bool:
            scores = scores.masked_fill(~call.mask, -torch.inf)
        elif call.mask is not None:
            scores = scores + call.mask
        value = value.repeat_interleave(call.query.shape[1] // value.shape[1], dim=1).double()
        torch.testing.assert_close(scores.softmax(dim=-1) @ value, output.double(), atol=1e-6, rtol=1e-6)


@FAMILIES
def test_every_layer_is_named_and_its_tokens_are_told_apart(small: Small):
    network, calls = small.build(), []
    with watch_attention(network, calls.append):
        output_of(network, small.inputs())
    names = dict(network.named_modules())
    found = {}
    for call in calls:
        assert call.layer in names
        ending = next((end for end in small.kinds if call.layer.endswith(end)), None)
        if ending is not None:
            found[ending] = (call.kind, call.image, call.text)
    assert found == small.kinds


@FAMILIES
def test_its_blocks_are_measured(small: Small):
    network, calls = small.build(), []
    with watch_attention(network, calls.append):
        output_of(network, small.inputs())
    for call in calls:
        for block, measured in measure_call(call, blocks_of(call)).items():
            assert measured.entropy.isfinite().all(), (call.layer, block)
            assert (measured.entropy >= -1e-6).all()
            assert (measured.normalised <= 1 + 1e-6).all()
