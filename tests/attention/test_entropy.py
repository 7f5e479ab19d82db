"""Attention entropy of rows, of samples of rows and of blocks against dense float64 softmax."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aegpo.attention.backends import choose_backend
from aegpo.attention.entropy import attention_entropy, measure_call, sample_rows, stratified_mean
from aegpo.core.records import AttentionCall
from aegpo.errors import AegpoError

EXACT = ["fused", "chunked"]


def dense(query, key, scale: float, mask=None) -> torch.Tensor:
    """Entropy of softmax(scale q k^T + mask) in float64 with the matrix in memory; nan where no key may be seen."""
    scores = scale * query.double() @ key.double().transpose(-2, -1)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -math.inf)
    elif mask is not None:
        scores = scores + mask
    weights = scores.softmax(dim=-1)
    return torch.special.entr(weights).sum(dim=-1)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_exact(found: torch.Tensor, expected: torch.Tensor, atol: float = 3e-6) -> None:
    torch.testing.assert_close(found.double(), expected, atol=atol, rtol=0, equal_nan=True)


# --- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", EXACT)
@settings(max_examples=30)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 3, 8, 32, 65]))
def test_entropies_are_those_of_the_dense_softmax(backend, batch, heads, queries, keys, width):
    query, key = normal(batch, heads, queries, width), normal(batch, heads, keys, width, seed=1)
    scale = 1 / math.sqrt(width)
    found = attention_entropy(query, key, scale=scale, backend=backend)
    assert found.shape == (batch, heads, queries)
    assert found.dtype == torch.float32
    assert_exact(found, dense(query, key, scale))


MASKS = {
    "keys": lambda keep: keep[:, :1, :1],
    "rows and keys": lambda keep: keep[:, :1],
    "heads, rows and keys": lambda keep: keep,
    "of every sample": lambda keep: keep[0, 0],
    "keys, -inf": lambda keep: torch.zeros(keep[:, :1, :1].shape).masked_fill(~keep[:, :1, :1], -math.inf),
    "keys, -10000": lambda keep: torch.zeros(keep[:, :1, :1].shape).masked_fill(~keep[:, :1, :1], -10000.0),
    "bias of keys": lambda keep: normal(*keep[:, :1, :1].shape, seed=5).masked_fill(~keep[:, :1, :1], -math.inf),
    "bias of keys, heads": lambda keep: normal(*keep[:, :, :1].shape, seed=5),
    "bias of rows": lambda keep: normal(*keep.shape, seed=5).masked_fill(~keep, -math.inf),
}


@pytest.mark.parametrize("backend", ["auto", *EXACT])
@pytest.mark.parametrize("name", MASKS)
@settings(max_examples=12)
@given(st.integers(1, 2), st.integers(1, 20), st.integers(1, 30), st.floats(0.05, 3), st.integers(0, 99))
def test_masked_entropies_are_those_of_the_dense_softmax(name, backend, batch, queries, keys, scale, seed):
    if (name, backend) == ("bias of rows", "fused"):
        return
    query, key = normal(batch, 2, queries, 8), normal(batch, 2, keys, 8, seed=1)
    keep = torch.rand((batch, 2, queries, keys), generator=torch.Generator().manual_seed(seed)) < 0.6
    keep[..., 0] = True
    mask = MASKS[name](keep)
    found = attention_entropy(query, key, scale=scale, mask=mask, backend=backend)
    assert_exact(found, dense(query, key, scale, mask), atol=2e-5 if scale > 1 else 5e-6)


@pytest.mark.parametrize("backend", EXACT)
def test_a_row_that_may_attend_to_no_key_has_no_entropy_at_all(backend):
    query, key, mask = normal(1, 1, 3, 8), normal(1, 1, 5, 8, seed=1), torch.ones(3, 5, dtype=torch.bool)
    mask[1] = False
    found = attention_entropy(query, key, scale=0.35, mask=mask, backend=backend)
    assert found.isnan().tolist() == [[[False, True, False]]]
    assert_exact(found, dense(query, key, 0.35, mask))


@pytest.mark.parametrize("backend", EXACT)
def test_chosen_rows_are_those_of_all_rows_in_the_given_order(backend):
    query, key, mask = normal(2, 2, 9, 8), normal(2, 2, 7, 8, seed=1), normal(9, 7, seed=2) < 1
    rows = torch.tensor([4, 0, 8, 2])
    found = attention_entropy(query, key, scale=0.35, mask=mask, rows=rows, backend=backend)
    assert_exact(found, dense(query, key, 0.35, mask)[:, :, rows])


@pytest.mark.parametrize("backend", EXACT)
@pytest.mark.parametrize(("queries", "keys"), [(1300, 700), (700, 1300)])
def test_long_sequences_are_exact_too(backend, queries, keys):
    query, key = normal(1, 2, queries, 16), normal(1, 2, keys, 16, seed=1)
    assert_exact(attention_entropy(query, key, scale=0.25, backend=backend), dense(query, key, 0.25), atol=5e-6)


@pytest.mark.parametrize("backend", EXACT)
@pytest.mark.parametrize("keys", [1, 2, 14, 50, 1024])
def test_uniform_scores_have_the_entropy_of_the_uniform_distribution(backend, keys):
    found = attention_entropy(torch.zeros(1, 1, 5, 8), normal(1, 1, keys, 8), scale=0.35, backend=backend)
    torch.testing.assert_close(found, torch.full_like(found, math.log(keys)), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("backend", EXACT)
def test_a_row_that_looks_at_one_key_has_no_entropy(backend):
    key = torch.eye(8)[None, None]
    found = attention_entropy(key[:, :, :3], key, scale=100.0, backend=backend)
    torch.testing.assert_close(found, torch.zeros(1, 1, 3), atol=1e-5, rtol=0)


@pytest.mark.parametrize("backend", EXACT)
@given(st.floats(-300, 300))
def test_an_offset_that_all_keys_share_changes_nothing(backend, offset):
    query, key = normal(1, 2, 12, 8), normal(1, 2, 20, 8, seed=1)
    moved = key + offset * normal(1, 2, 1, 8, seed=2)
    found = attention_entropy(query, moved, scale=0.35, backend=backend)
    assert_exact(found, dense(query, moved, 0.35), atol=5e-6)
    assert_exact(found, dense(query, key, 0.35), atol=2e-4)  # what adding the offset in float32 has rounded away


@pytest.mark.parametrize("backend", EXACT)
def test_half_precision_and_strided_inputs_are_measured_in_float32(backend):
    query, key = normal(2, 30, 4, 8).transpose(1, 2), normal(2, 20, 4, 8, seed=1).transpose(1, 2)  # not contiguous
    assert_exact(attention_entropy(query, key, scale=0.35, backend=backend), dense(query, key, 0.35))
    for dtype in (torch.bfloat16, torch.float16):
        query, key = query.to(dtype), key.to(dtype)
        assert_exact(attention_entropy(query, key, scale=0.35, backend=backend), dense(query, key, 0.35))


@pytest.mark.parametrize("masked", [False, True])
def test_gradients_are_those_of_the_dense_softmax(masked, monkeypatch):
    monkeypatch.setattr("aegpo.attention.backends.CHUNKS", {"cpu": 100})  # several chunks
    query, key = (side.requires_grad_() for side in (normal(2, 2, 9, 8), normal(2, 2, 7, 8, seed=1)))
    mask = (normal(9, 7, seed=2) < 0.5).index_fill(1, torch.tensor([0]), True) if masked else None
    weight = normal(2, 2, 9, seed=3)
    (attention_entropy(query, key, scale=0.35, mask=mask) * weight).sum().backward()
    found = query.grad.clone(), key.grad.clone()
    query.grad = key.grad = None
    scores = 0.35 * query.double() @ key.double().transpose(-2, -1)
    hidden = torch.zeros(9, 7, dtype=torch.bool) if mask is None else ~mask
    log_weights = scores.masked_fill(hidden, -1e9).log_softmax(dim=-1)
    (-(log_weights.exp() * log_weights.masked_fill(hidden, 0)).sum(dim=-1) * weight).sum().backward()
    torch.testing.assert_close(found, (query.grad, key.grad), atol=1e-5, rtol=1e-5)


def test_a_row_without_keys_has_no_gradient_and_harms_no_other():
    query, key, mask = normal(1, 1, 3, 8), normal(1, 1, 5, 8, seed=1), torch.ones(3, 5, dtype=torch.bool)
    mask[1] = False
    query.requires_grad_()
    attention_entropy(query, key, scale=0.35, mask=mask)[..., [0, 2]].sum().backward()
    assert query.grad.isfinite().all()
    assert (query.grad[0, 0, 1] == 0).all()
    assert (query.grad[0, 0, 0] != 0).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "flash"}, "no backend 'flash'; known: auto, fused, cuda-flash, cuda-efficient, chunked"),
        (
            {"backend": "cuda-flash"},
            "backend 'cuda-flash' runs on a cuda device, the tensors are on 'cpu'; choose 'auto' or 'chunked'",
        ),
        (
            {"backend": "fused", "mask": torch.arange(35.0).view(5, 7)},
            "backend 'fused' takes no additive bias that differs between rows; choose 'auto' or 'chunked'",
        ),
        (
            {"backend": "fused", "query": torch.zeros(1, 2, 5, 8, requires_grad=True)},
            "backend 'fused' carries no gradient, and one is asked for; choose 'auto' or 'chunked'",
        ),
        (
            {"query": torch.zeros(1, 3, 5, 8)},
            "query (1, 3, 5, 8) and key (1, 2, 7, 8) do not fit; they should be (B, heads, queries, d) and (B, heads, "
            "keys, d) with at least one key",
        ),
        (
            {"key": torch.zeros(1, 2, 0, 8)},
            "query (1, 2, 5, 8) and key (1, 2, 0, 8) do not fit; they should be (B, heads, queries, d) and (B, heads, "
            "keys, d) with at least one key",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(options, message):
    arguments = {"query": torch.zeros(1, 2, 5, 8), "key": torch.zeros(1, 2, 7, 8), "scale": 1.0} | options
    with pytest.raises(AegpoError) as error:
        attention_entropy(**arguments)
    assert str(error.value) == f"attention_entropy: {message}"


@pytest.mark.parametrize(
    ("device", "own"), [("cpu", "fused"), ("cuda", "cuda-efficient"), ("mps", "chunked"), ("xpu", "chunked")]
)
def test_a_device_s_own_operator_is_chosen_wherever_it_is_exact(device, own):
    assert choose_backend(device, gradient=False, bias_of_rows=False) == own
    assert choose_backend(device, gradient=True, bias_of_rows=False) == "chunked"
    assert choose_backend(device, gradient=False, bias_of_rows=True) == "chunked"


@pytest.mark.parametrize("backend", ["fused", "chunked"])
def test_the_autocast_of_a_network_that_is_watched_does_not_round_scores(backend):
    query, key = (torch.randn(1, 2, 60, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(2))
    expected = attention_entropy(3 * query, key, scale=0.25, backend=backend)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attention_entropy(3 * query, key, scale=0.25, backend=backend), expected)


@pytest.mark.parametrize(
    ("options", "backend"),
    [
        ({}, "fused"),
        ({"mask": torch.ones(5, 7, dtype=torch.bool).tril(3)}, "fused"),
        ({"mask": torch.arange(7.0)}, "fused"),
        ({"mask": torch.arange(35.0).view(5, 7)}, "chunked"),
        ({"query": normal(1, 2, 5, 8).requires_grad_()}, "chunked"),
    ],
    ids=["plain", "mask", "bias of keys", "bias of rows", "gradient"],
)
def test_the_choice_on_a_cpu_is_the_named_backend_to_the_bit(options, backend):
    arguments = {"query": normal(1, 2, 5, 8), "key": normal(1, 2, 7, 8, seed=1), "scale": 0.35} | options
    assert torch.equal(attention_entropy(**arguments), attention_entropy(**arguments, backend=backend))


# --- blocks ----------------------------------------------------------------------------------------------------------

IMAGE, TEXT = slice(0, 36), slice(36, 50)
BLOCKS = {
    "joint": (slice(0, 50), slice(0, 50)),
    "image-image": (IMAGE, IMAGE),
    "image-text": (IMAGE, TEXT),
    "text-image": (TEXT, IMAGE),
    "text-text": (TEXT, TEXT),
}


def joint_call(mask=None) -> AttentionCall:
    """A joint attention of 36 image and 14 text tokens, two samples and two heads."""
    return AttentionCall("layer", "joint", normal(2, 2, 50, 8), normal(2, 2, 50, 8, seed=1), 0.35, IMAGE, TEXT, mask)


@pytest.mark.parametrize("masses", [True, False])
@pytest.mark.parametrize("blocks", [[name] for name in BLOCKS] + [list(BLOCKS)])
def test_a_block_is_its_rows_with_the_softmax_over_its_keys(blocks, masses):
    call = joint_call()
    weights = (call.scale * call.query.double() @ call.key.double().transpose(-2, -1)).softmax(dim=-1)
    found = measure_call(call, blocks, masses=masses)
    assert list(found) == blocks
    for name, block in found.items():
        rows, keys = BLOCKS[name]
        assert_exact(block.entropy, dense(call.query[:, :, rows], call.key[:, :, keys], call.scale).mean(dim=2))
        assert (block.standard_error == 0).all()
        assert block.valid_keys.tolist() == [keys.stop - keys.start] * 2
        assert_exact(block.normalised, block.entropy.double() / math.log(keys.stop - keys.start))
        if masses:
            assert_exact(block.mass, weights[:, :, rows, keys].sum(dim=3).mean(dim=2), atol=1e-6)
        else:
            assert block.mass is None


def test_every_block_belongs_to_the_calls_that_have_it():
    text = slice(36, 36)
    calls = {
        "joint": joint_call(),
        "self": AttentionCall("layer", "self", normal(1, 2, 36, 8), normal(1, 2, 36, 8), 0.35, IMAGE, text),
        "cross": AttentionCall("layer", "cross", normal(1, 2, 36, 8), normal(1, 2, 14, 8), 0.35, IMAGE, slice(0, 14)),
    }
    for kind, call in calls.items():
        found = measure_call(call, [*BLOCKS, "self", "cross"])
        assert list(found) == (list(BLOCKS) if kind == "joint" else [kind])
        if kind != "joint":
            assert_exact(found[kind].entropy, dense(call.query, call.key, 0.35).mean(dim=2))
            assert (found[kind].mass == 1).all()


def padded(*lengths: int) -> torch.Tensor:
    """(B, 1, 1, 50) bool: the text keys beyond each length are padding."""
    mask = torch.ones(len(lengths), 1, 1, 50, dtype=torch.bool)
    for row, length in enumerate(lengths):
        mask[row, :, :, 36 + length :] = False
    return mask


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("name", BLOCKS)
def test_padding_is_neither_a_key_nor_a_row(name, additive):
    mask, lengths = padded(5, 14), (5, 14)
    call = joint_call(torch.zeros(mask.shape).masked_fill(~mask, -10000.0) if additive else mask)
    block = measure_call(call, list(BLOCKS))[name]
    for row, length in enumerate(lengths):
        alone = AttentionCall(
            "layer",
            "joint",
            call.query[row : row + 1, :, : 36 + length],
            call.key[row : row + 1, :, : 36 + length],
            0.35,
            IMAGE,
            slice(36, 36 + length),
        )
        expected = measure_call(alone, list(BLOCKS))[name]
        assert_exact(block.entropy[row], expected.entropy[0].double())
        assert_exact(block.mass[row], expected.mass[0].double())
        assert block.valid_keys[row] == expected.valid_keys[0]


def test_a_prompt_without_words_has_no_entropy_over_them_and_gives_them_no_mass():
    found = measure_call(joint_call(padded(0, 14)), list(BLOCKS))
    assert found["image-text"].entropy.isnan().tolist() == [[True, True], [False, False]]
    assert found["image-text"].mass[0].tolist() == [0, 0]
    assert found["text-image"].entropy.isnan().tolist() == [[True, True], [False, False]]
    assert found["image-image"].mass[0].tolist() == [1, 1]
    torch.testing.assert_close(found["joint"].entropy[0], found["image-image"].entropy[0])


def test_a_causal_mask_counts_the_keys_each_row_may_see():
    mask = torch.ones(50, 50, dtype=torch.bool).tril()
    call = joint_call(mask)
    found = measure_call(call, list(BLOCKS))
    every = dense(call.query, call.key, 0.35, mask)
    assert_exact(found["joint"].entropy, every.mean(dim=2))
    assert_exact(found["image-image"].entropy, every[:, :, IMAGE].mean(dim=2))
    assert found["image-text"].entropy.isnan().all()
    assert found["image-text"].valid_keys.tolist() == [0, 0]
    assert found["image-text"].mass.tolist() == [[0, 0], [0, 0]]


def test_tokens_that_are_neither_image_nor_text_take_part_in_the_joint_softmax_only():
    image, text = slice(4, 40), slice(40, 50)
    call = AttentionCall("layer", "joint", normal(2, 2, 50, 8), normal(2, 2, 50, 8, seed=1), 0.35, image, text)
    weights = (call.scale * call.query.double() @ call.key.double().transpose(-2, -1)).softmax(dim=-1)
    found = measure_call(call, list(BLOCKS))
    assert_exact(found["joint"].entropy, dense(call.query, call.key, 0.35).mean(dim=2))
    assert_exact(found["text-text"].entropy, dense(call.query[:, :, text], call.key[:, :, text], 0.35).mean(dim=2))
    assert_exact(found["text-image"].mass, weights[:, :, text, image].sum(dim=3).mean(dim=2))


# --- samples of rows -------------------------------------------------------------------------------------------------


def test_rows_are_drawn_in_proportion_from_image_and_text():
    rows = sample_rows(slice(0, 900), slice(900, 1000), 1000, 100, seed=0)
    assert len(rows.unique()) == 100
    assert torch.equal(rows, rows.sort().values)
    assert (rows >= 900).sum() == 10


@given(st.integers(0, 30), st.integers(0, 30), st.integers(0, 5), st.integers(3, 70), st.integers(0, 5))
def test_a_draw_has_the_asked_size_and_some_of_every_kind(image, text, rest, rows, seed):
    total = image + text + rest
    drawn = sample_rows(slice(0, image), slice(image, image + text), total, rows, seed)
    assert len(drawn.unique()) == len(drawn) == min(rows, total)
    for begin, size in ((0, image), (image, text), (image + text, rest)):
        count = int(((drawn >= begin) & (drawn < begin + size)).sum())
        assert count >= min(size, 2 if rows >= 6 else 1)


def test_the_seed_fixes_the_rows():
    draws = [sample_rows(slice(0, 36), slice(36, 50), 50, 10, seed).tolist() for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert sample_rows(slice(0, 36), slice(36, 50), 50, "all", 0).tolist() == list(range(50))


def test_too_few_rows_for_every_kind_of_token_are_refused():
    with pytest.raises(AegpoError) as error:
        sample_rows(slice(0, 36), slice(36, 50), 50, 1, 0)
    assert str(error.value) == ("rows: 1 cannot stand for 2 kinds of token (image, text, other); give at least 2")


@pytest.mark.parametrize("name", BLOCKS)
def test_a_sample_is_unbiased_and_its_error_covers_the_truth(name):
    call = joint_call(padded(5, 14))
    exact = measure_call(call, [name])[name]
    draws = [measure_call(call, [name], rows=8, seed=seed)[name] for seed in range(200)]
    for field in ("entropy", "mass"):
        truth = getattr(exact, field)
        values = torch.stack([getattr(draw, field) for draw in draws])
        spread = values.std(dim=0) / math.sqrt(len(draws))
        assert ((values.mean(dim=0) - truth).abs() <= 4 * spread + 1e-6).all(), field
    errors = torch.stack([draw.standard_error for draw in draws])
    values = torch.stack([draw.entropy for draw in draws])
    true_error = values.std(dim=0)
    torch.testing.assert_close(errors.square().mean(dim=0).sqrt(), true_error, rtol=0.25, atol=1e-6)
    covered = ((values - exact.entropy).abs() <= 2.4 * errors + 1e-6).float().mean(dim=0)
    assert (covered >= 0.85).all()


def test_a_sample_as_large_as_the_population_has_no_error():
    call = joint_call(padded(5, 14))
    for name in BLOCKS:
        every, most = measure_call(call, [name])[name], measure_call(call, [name], rows=49)[name]
        torch.testing.assert_close(most.entropy, every.entropy, atol=0.02, rtol=0)
        assert (most.standard_error[0] == 0).all()  # 41 real rows, all of them drawn


def test_the_stratified_mean_is_the_textbook_one():
    values = torch.tensor([[[1.0, 3.0, 10.0, 14.0, 99.0]]])
    stratum, sizes = torch.tensor([[0, 0, 1, 1, -1]]), torch.tensor([[6, 2]])
    mean, error = stratified_mean(values, stratum, sizes, drawn_all=False)
    assert mean.item() == pytest.approx(0.75 * 2 + 0.25 * 12)
    assert error.item() == pytest.approx(math.sqrt(0.75**2 * (1 - 2 / 6) * 2 / 2))  # the second stratum is complete
    same, none = stratified_mean(values, stratum, torch.tensor([[2, 2]]), drawn_all=True)
    known, nothing = stratified_mean(values, stratum, torch.tensor([[2, 2]]), drawn_all=False)
    assert same.item() == known.item() == 7
    assert none.item() == nothing.item() == 0


def test_one_row_of_several_has_no_known_error():
    stratum = torch.zeros(1, 1, dtype=torch.long)
    mean, error = stratified_mean(torch.ones(1, 1, 1), stratum, torch.tensor([[3]]), drawn_all=False)
    assert mean.item() == 1
    assert error.isnan().all()


# --- backends that need what this machine may not have ----------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("backend", ["auto", "cuda-flash", "cuda-efficient", "chunked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [None, "keys", "rows and keys", "bias of keys", "bias of rows"])
def test_a_gpu_agrees_with_the_dense_softmax(name, dtype, backend):
    if backend == "cuda-flash" and (dtype == torch.float32 or name is not None):
        pytest.skip("takes half precision without a mask")
    if backend == "cuda-efficient" and name == "bias of rows":
        pytest.skip("takes no bias that differs between rows")
    query, key = normal(2, 2, 300, 64).to("cuda", dtype), normal(2, 2, 410, 64, seed=1).to("cuda", dtype)
    keep = torch.rand((2, 2, 300, 410), generator=torch.Generator().manual_seed(0)) < 0.6
    mask = None if name is None else MASKS[name](keep).cuda()
    found = attention_entropy(query, key, scale=0.125, mask=mask, backend=backend)
    rounded = dtype == torch.bfloat16 and backend == "cuda-flash"  # the mean key comes back in bfloat16
    assert_exact(found, dense(query, key, 0.125, mask), atol=2e-2 if rounded else 1e-4)
