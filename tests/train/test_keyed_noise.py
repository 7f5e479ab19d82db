"""Noise by key: a function of the key alone, normal, and without relation between any two keys."""

from __future__ import annotations

import hashlib
from itertools import product
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aegpo.core.records import Prompt
from aegpo.prompts.lists import numbered
from aegpo.train.noise import KeyedNoise, Purpose, prompt_noise

PURPOSES = get_args(Purpose)
LATENTS = (3, 24, 24)


def nodes(*numbers: int) -> np.ndarray:
    return np.array(numbers, dtype=np.int64)


shapes = st.sampled_from([(1,), (7,), (1, 4, 4), (3, 5, 5)])  # odd sizes leave half a word of bits


@given(st.permutations(range(6)), st.integers(1, 5), shapes, st.sampled_from(PURPOSES))
def test_who_asks_for_which_nodes_in_which_order_does_not_matter(order, cut, shape, purpose):
    whole = KeyedNoise(3, 5, purpose).of(2, nodes(*range(6)), shape)
    assert (whole.shape, whole.dtype) == ((6, *shape), torch.float32)
    shared = KeyedNoise(3, 5, purpose)
    shared.of(1, nodes(9), (2, 3))  # what was asked before
    first, second = shared.of(2, nodes(*order[:cut]), shape), shared.of(2, nodes(*order[cut:]), shape)
    assert torch.equal(torch.cat([first, second]), whole[list(order)])
    for node in order:
        assert torch.equal(KeyedNoise(3, 5, purpose).of(2, nodes(node), shape)[0], whole[node])


def test_nodes_that_share_a_number_share_their_noise():
    found = KeyedNoise(0, 1, "start").of(0, nodes(0, 0, 1, 0), LATENTS)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[3])
    assert not torch.equal(found[0], found[2])


def test_no_nodes_have_no_noise():
    assert KeyedNoise(0, 1, "level").of(0, nodes(), LATENTS).shape == (0, *LATENTS)


@given(
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**63 - 1),
    st.integers(0, 2**63 - 1),
    st.sampled_from(PURPOSES),
)
def test_the_key_is_seed_and_step_and_the_counter_starts_at_node_level_and_purpose(seed, step, level, node, purpose):
    key = np.array([seed, step], dtype=np.uint64)
    counter = np.array([0, node, level, 1 + PURPOSES.index(purpose)], dtype=np.uint64)
    expected = np.random.Generator(np.random.Philox(key=key, counter=counter)).standard_normal(9, dtype=np.float32)
    assert KeyedNoise(seed, step, purpose).of(level, nodes(node), (9,))[0].tolist() == expected.tolist()


def test_every_part_of_the_key_counts_and_none_stands_for_another():
    seen = set()
    for seed, step, level, node in product(range(3), repeat=4):  # (1, 2) and (2, 1), neighbours and far ones
        for purpose in PURPOSES:
            noise = KeyedNoise(seed, step, purpose).of(level, nodes(node), (1, 4, 4))
            seen.add(tuple(noise.flatten().tolist()))
    assert len(seen) == 3**4 * len(PURPOSES)


def test_noise_is_standard_normal():
    noise = KeyedNoise(0, 1, "level").of(3, np.arange(200), LATENTS).double()
    count = noise.numel()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float(noise.pow(power).mean()) - moment) < 4.5 * (variance / count) ** 0.5
    ordered = noise.flatten().sort().values
    share = torch.arange(1, count + 1) / count
    assert (torch.special.ndtr(ordered) - share).abs().max() < 2.3 / count**0.5  # Kolmogorov: p about 5e-5
    each = noise.flatten(1)
    assert each.mean(dim=1).abs().max() < 5 / each.shape[1] ** 0.5
    assert (each.var(dim=1) - 1).abs().max() < 5 * (2 / each.shape[1]) ** 0.5


WAYS = {
    "nodes": [("level", 0, 1, 2, node) for node in range(60)],
    "nodes far apart": [("level", 0, 1, 2, 2**node) for node in range(60)],
    "levels": [("level", 0, 1, level, 0) for level in range(60)],
    "steps": [("level", 0, step, 2, 0) for step in range(60)],
    "seeds": [("level", seed, 1, 2, 0) for seed in range(60)],
    "purposes": [(purpose, 0, step, 2, 0) for purpose in PURPOSES for step in range(12)],
}


@pytest.mark.parametrize("keys", WAYS.values(), ids=WAYS)
def test_no_two_keys_have_related_noise(keys):
    rows = torch.cat([KeyedNoise(seed, step, use).of(level, nodes(n), LATENTS) for use, seed, step, level, n in keys])
    flat = rows.flatten(1).double()
    for moved in (0, 1, 2, 3, 4, 8):  # whole, and by as many values as a block or half of one has
        one, other = flat[:, moved:], flat[:, : flat.shape[1] - moved]
        related = one @ other.T / one.shape[1]
        if moved == 0:
            related -= torch.diag(torch.diag(related))
        assert related.abs().max() < 5.5 / one.shape[1] ** 0.5, moved


def test_the_noise_of_a_key_is_what_it_was():
    """numpy may change how bits become normals; then the noise of every run changes, which must be known and said."""
    digest = hashlib.sha256()
    for purpose in PURPOSES:
        noise = KeyedNoise(2, 7, purpose).of(4, nodes(0, 11), (2, 3, 3))
        digest.update(noise.numpy().astype("<f4").tobytes())
    assert digest.hexdigest() == "79edfc7d14c276a820b8df453ab53a0712083c4a387a04d3661117bbb060b7a5"
    first = KeyedNoise(0, 1, "start").of(0, nodes(0), (4,))[0].tolist()
    assert first == pytest.approx([-1.2998049, -0.2862371, -2.2710202, 0.2784944], abs=1e-6)


# --- of prompts ------------------------------------------------------------------------------------------------------


def of(prompts, seed: int = 0, purpose="evaluation", sample: int = 0):
    return prompt_noise((2, 3, 3), seed, prompts, purpose, sample)


def test_a_prompts_noise_does_not_depend_on_where_it_stands():
    one, other = numbered(["a cat", "a dog", "a cat"]), numbered(["a dog", "a cow", "a cat", "a cat"])
    first, second = of(one), of(other)
    assert torch.equal(first[0], second[2])
    assert torch.equal(first[1], second[0])
    assert torch.equal(first[2], second[3])  # the second to ask for a cat
    assert len(torch.cat([first, second]).flatten(1).unique(dim=0)) == 4


def test_a_prompts_noise_is_of_its_seed_sample_and_purpose():
    cat = numbered(["a cat"])
    drawn = [of(cat), of(cat, seed=1), of(cat, sample=1), of(cat, purpose="signal")]
    assert len(torch.cat(drawn).flatten(1).unique(dim=0)) == 4


def test_prompts_of_other_images_have_other_noise(tmp_path):
    one, other = tmp_path / "one.png", tmp_path / "other.png"
    one.write_bytes(b"one")
    other.write_bytes(b"other")
    bare, *shown = (Prompt(0, "a cat", images=images) for images in ((), (one,), (other,)))
    assert len(of([bare, *shown]).flatten(1).unique(dim=0)) == 3
    other.write_bytes(b"one")
    assert torch.equal(of([shown[0]]), of([shown[1]]))
