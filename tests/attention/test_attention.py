"""Watching a network's attention: everything is seen, nothing is changed."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel, attention_backend
from diffusers.models.attention_processor import Attention, SanaLinearAttnProcessor2_0
from networks import NETWORKS
from torch import nn
from worlds import asked

from aegpo.attention.layouts import Site, Tokens, layout_of
from aegpo.attention.tap import AttentionTap, watch_attention
from aegpo.core.records import AttentionCall
from aegpo.core.sections import PolicySpec
from aegpo.errors import AegpoError
from aegpo.models.adapters import add_adapters
from aegpo.models.shapes import ShapesSpec

CAPTIONS = ["a red circle", "two blue squares and a green triangle"]
LAYERS = ["transformer_blocks.0.attn", "transformer_blocks.1.attn"]


def inputs(model):
    latents = torch.randn((2, *model.latent_shape), generator=torch.Generator().manual_seed(0))
    return latents, torch.tensor([0.9, 0.3]), model.encode(asked(CAPTIONS))


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
    with tiny_model.frozen("base"):
        pass
    with torch.no_grad():
        for weight in tiny_model.policy.transformer_blocks[0].attn.to_q.parameters():
            weight.mul_(-1)
    _, policy = watched(tiny_model)
    with tiny_model.frozen("base"):
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
    with tiny_model.frozen("base"):
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


# --- what a tap is given ---------------------------------------------------------------------------------------------


def everything(site: Site) -> Tokens:
    return Tokens("self", slice(0, site.queries), slice(0, 0))


def test_causal_attention_is_a_mask_and_grouped_keys_are_repeated():
    query, key = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8)
    network = nn.ModuleDict(
        {"attn": Block(lambda q, k: F.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True))}
    )
    calls: list[AttentionCall] = []
    with watch_attention(network, calls.append, everything):
        output = network["attn"](query, key)
    (seen,) = calls
    scores = seen.scale * seen.query @ seen.key.transpose(-2, -1)
    weights = scores.masked_fill(~seen.mask, -torch.inf).softmax(dim=-1)
    torch.testing.assert_close(weights @ key.repeat_interleave(2, dim=1), output)


def test_a_pattern_and_a_kind_choose_the_calls(tiny_model):
    calls: list[AttentionCall] = []
    tap = AttentionTap(calls.append, layers="*.1.attn", kinds=("joint", "cross"))
    with torch.no_grad(), tiny_model.tap_attention(tap):
        tiny_model.velocity(*inputs(tiny_model))
    tap.check()
    assert [call.layer for call in calls] == LAYERS[1:]
    assert tap.calls == 1


def test_a_choice_that_no_attention_meets_is_an_error_that_says_what_there_is(tiny_model):
    tap = AttentionTap(lambda call: None, layers="*single*", kinds=("joint",))
    tap.check()  # nothing has run yet
    with torch.no_grad(), tiny_model.tap_attention(tap):
        tiny_model.velocity(*inputs(tiny_model))
    with pytest.raises(AegpoError) as error:
        tap.check()
    assert str(error.value) == (
        "no softmax attention has a layer like '*single*' and kind joint; the network has "
        "transformer_blocks.0.attn (joint), transformer_blocks.1.attn (joint)"
    )


def test_two_taps_see_the_same(tiny_model):
    outer: list[AttentionCall] = []
    with tiny_model.tap_attention(outer.append):
        _, inner = watched(tiny_model)
    assert [call.layer for call in outer] == [call.layer for call in inner] == LAYERS


def test_gradient_checkpointing_shows_every_layer_once_and_changes_no_gradient(tiny_model):
    network = tiny_model.policy.train()
    network.enable_gradient_checkpointing()
    calls: list[AttentionCall] = []
    gradients = []
    for tap in (None, calls.append):
        network.zero_grad()
        with watch_attention(network, tap) if tap else nullcontext():
            tiny_model.velocity(*inputs(tiny_model)).square().sum().backward()
        gradients.append([weight.grad.clone() for weight in network.parameters() if weight.grad is not None])
    assert [call.layer for call in calls] == LAYERS
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


class Wrapper(nn.Module):
    """A network inside another module, as DDP holds it."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def test_a_network_inside_a_wrapper_is_found(tiny_model):
    latents, sigma, cond = inputs(tiny_model)
    calls: list[AttentionCall] = []
    wrapped = Wrapper(tiny_model.policy)
    with torch.no_grad(), watch_attention(wrapped, calls.append):
        wrapped(latents, cond.text, cond.pooled, sigma * 1000)
    assert [(call.layer, call.text) for call in calls] == [(layer, slice(36, 50)) for layer in LAYERS]


def sharded(rank, folder, queue):
    """One of two processes: a network sharded by FSDP2 shows what the whole network shows."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model = ShapesSpec(weights=folder / "weights").build(torch.device("cpu"))
    _, whole = watched(model)
    for block in model.policy.transformer_blocks:
        torch.distributed.fsdp.fully_shard(block)
    torch.distributed.fsdp.fully_shard(model.policy)
    _, shards = watched(model)
    same = [
        torch.equal(one.query, other.query) and one.text == other.text for one, other in zip(whole, shards, strict=True)
    ]
    queue.put((rank, [call.layer for call in shards], same))
    torch.distributed.destroy_process_group()


def test_a_network_in_shards_on_two_processes_shows_the_same(tiny_weights, tmp_path):
    (tmp_path / "weights").symlink_to(tiny_weights)
    queue = torch.multiprocessing.get_context("fork").SimpleQueue()
    torch.multiprocessing.start_processes(sharded, (tmp_path, queue), nprocs=2, start_method="fork")
    assert sorted(queue.get() for _ in range(2)) == [(rank, LAYERS, [True, True]) for rank in range(2)]


# --- what cannot be seen ---------------------------------------------------------------------------------------------


class Hidden(nn.Module):
    """Computes its attention itself."""

    def __call__(self, query, key):
        return (query @ key.transpose(-2, -1)).softmax(dim=-1) @ key


class Sequence(nn.Module):
    """A network of one attention."""

    def __init__(self, attn):
        super().__init__()
        self.attn = attn

    def forward(self, hidden_states, encoder_hidden_states=None):
        return self.attn(hidden_states, encoder_hidden_states)


def refused(network, *arguments) -> str:
    with pytest.raises(AegpoError) as error, torch.no_grad(), watch_attention(network, lambda call: None):
        network(*arguments)
    return str(error.value)


def test_a_network_without_softmax_attention_says_so():
    linear = Attention(16, heads=2, dim_head=8, processor=SanaLinearAttnProcessor2_0())
    assert refused(Sequence(linear), torch.randn(1, 6, 16)) == (
        "Sequence has linear attention only (SanaLinearAttnProcessor2_0): without a softmax there is no attention "
        "entropy to measure"
    )
    assert refused(nn.Linear(2, 2), torch.zeros(1, 2)) == (
        "Linear has no attention modules, so there is no attention entropy to measure"
    )


def test_an_attention_backend_that_hides_the_attention_is_named():
    small = next(small for small in NETWORKS if small.name == "FluxTransformer2DModel")
    network, arguments = small.build(), small.inputs()
    with (
        pytest.raises(AegpoError) as error,
        torch.no_grad(),
        watch_attention(network, lambda call: None),
        attention_backend("flex"),
    ):
        network(**arguments)
    assert str(error.value) == (
        "the attention of FluxTransformer2DModel cannot be seen: the attention backend 'flex' does not call torch's "
        'scaled_dot_product_attention; run it inside diffusers\' attention_backend("native")'
    )
    with attention_backend("native"):  # restores what `set_attention_backend` sets for every network
        network.set_attention_backend("flex")
        with (
            pytest.raises(AegpoError, match="the attention backend 'flex' does not call"),
            torch.no_grad(),
            watch_attention(network, lambda call: None),
        ):
            network(**arguments)


def test_a_processor_that_hides_the_attention_is_named():
    message = refused(Sequence(Block(Hidden())), torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 8))
    assert message.startswith("the attention of Sequence cannot be seen: its Hidden does not call torch's")


def test_watching_a_network_that_never_runs_is_no_error():
    with watch_attention(nn.Linear(2, 2), lambda call: None):
        pass


# --- layouts of networks that are not known --------------------------------------------------------------------------


def kind_of(queries, keys, context, **arguments) -> Tokens:
    return layout_of(Sequence(nn.Identity()))(Site("attn", queries, keys, context, arguments))


def test_token_counts_that_leave_no_doubt_are_enough():
    image, text = torch.zeros(1, 9, 4), torch.zeros(1, 5, 4)
    assert kind_of(9, 9, None, hidden_states=image, encoder_hidden_states=text).kind == "self"
    assert kind_of(9, 5, 5, hidden_states=image, encoder_hidden_states=text).kind == "cross"
    assert kind_of(9, 9, None, hidden_states=torch.zeros(1, 4, 3, 3)).kind == "self"


@pytest.mark.parametrize("count", [14, 9])
def test_an_unknown_order_of_image_and_text_is_refused(count):
    with pytest.raises(AegpoError) as error:
        kind_of(count, count, None, hidden_states=torch.zeros(1, 4, 6, 6), encoder_hidden_states=torch.zeros(1, 5, 4))
    assert str(error.value).startswith(
        f"layer 'attn' of Sequence attends from {count} to {count} tokens, and it is not known which of them are text; "
        "give watch_attention a layout of your own (known networks: AuraFlowTransformer2DModel, Chroma"
    )


def test_tokens_that_do_not_fit_a_known_network_are_refused():
    small = next(small for small in NETWORKS if small.name == "FluxTransformer2DModel")
    arguments = small.inputs()
    for queries, keys in ((16, 4), (99, 99)):
        with pytest.raises(AegpoError) as error:
            layout_of(small.build())(Site("transformer_blocks.0.attn", queries, keys, None, arguments))
        assert str(error.value) == (
            f"layer 'transformer_blocks.0.attn' of FluxTransformer2DModel attends from {queries} to {keys} tokens, "
            "which does not fit its 16 image and 7 text tokens; give watch_attention a layout of your own"
        )


def test_prompts_of_different_length_in_one_sequence_are_refused():
    small = next(small for small in NETWORKS if small.name == "Lumina2Transformer2DModel")
    network, arguments = small.build(), small.inputs()
    arguments["encoder_attention_mask"] = torch.arange(7) < torch.tensor([[7], [4]])
    with pytest.raises(AegpoError) as error, torch.no_grad(), watch_attention(network, lambda call: None):
        network(**arguments)
    assert str(error.value) == (
        "Lumina2Transformer2DModel puts samples with 4 and 7 words into one batch, so that tokens of the same place "
        "are of different kinds; watch one sample at a time"
    )
