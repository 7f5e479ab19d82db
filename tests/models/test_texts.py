"""Texts of unequal length in one batch, and what guidance does to predictions."""

from __future__ import annotations

import pytest
import torch

from aegpo.core.records import Conditioning
from aegpo.models.pipeline.network import Guidance, guided
from aegpo.models.pipeline.packing import pack, unpack
from aegpo.models.pipeline.texts import joined, unpadded


def text_of(rows, length, value=1.0, **fields):
    return Conditioning(torch.full((rows, length, 3), value), **fields)


def test_equal_texts_without_a_mask_are_joined_without_one():
    both = joined([text_of(2, 4, pooled=torch.zeros(2, 5)), text_of(1, 4, value=2.0, pooled=torch.ones(1, 5))])
    assert both.mask is None
    assert both.text[:, 0, 0].tolist() == [1, 1, 2]
    assert both.pooled[:, 0].tolist() == [0, 0, 1]


def test_a_shorter_text_is_padded_and_masked():
    both = joined([text_of(1, 4), text_of(1, 2, value=2.0)])
    assert both.text[1, :, 0].tolist() == [2, 2, 0, 0]
    assert both.mask.dtype == torch.bool
    assert both.mask.tolist() == [[True] * 4, [True, True, False, False]]
    assert both.pooled is None


def test_a_mask_stays_beside_a_text_that_has_none():
    masked = text_of(1, 3, mask=torch.tensor([[1, 1, 0]]))
    assert joined([text_of(1, 3), masked]).mask.tolist() == [[True] * 3, [True, True, False]]


def test_one_row_has_no_padding_of_the_others():
    cond = joined([text_of(1, 4), text_of(1, 2, value=2.0)])
    for row, (length, value) in enumerate([(4, 1.0), (2, 2.0)]):
        alone = unpadded(cond, row)
        assert alone.mask is None
        assert torch.equal(alone.text, torch.full((1, length, 3), value))
    again = joined([unpadded(cond, 0), unpadded(cond, 1)])
    assert torch.equal(again.text, cond.text)
    assert torch.equal(again.mask, cond.mask)


def test_what_else_the_network_reads_goes_with_its_row():
    parts = [text_of(2, 4, extra={"of": torch.tensor([[1], [2]])}), text_of(1, 2, extra={"of": torch.tensor([[3]])})]
    both = joined(parts)
    assert both.extra["of"].tolist() == [[1], [2], [3]]
    assert both.select(torch.tensor([2, 0, 2])).extra["of"].tolist() == [[3], [1], [3]]
    assert unpadded(both, 2).extra["of"].tolist() == [[3]]
    with pytest.raises(KeyError, match="of"):
        joined([parts[0], text_of(1, 4)])


@pytest.mark.parametrize("together", [False, True])
def test_guidance_gives_each_half_what_else_is_its_own(together):
    def predict(latents, sigma, cond):
        return torch.ones_like(latents) * cond.extra["of"].view(-1, 1, 1, 1)

    latents, sigma = torch.zeros(2, 1, 2, 2), torch.ones(2)
    cond, nothing = text_of(2, 4, extra={"of": torch.tensor([5.0, 7.0])}), text_of(1, 4, extra={"of": torch.ones(1)})
    steered = guided(predict, latents, sigma, cond, Guidance(nothing, 3.0, "both"), together)
    assert steered[:, 0, 0, 0].tolist() == [1 + 3 * 4, 1 + 3 * 6]


def test_a_gap_within_a_text_stays_masked():
    alone = unpadded(text_of(1, 4, mask=torch.tensor([[True, False, True, False]])), 0)
    assert alone.text.shape[1] == 3
    assert alone.mask.tolist() == [[True, False, True]]


def test_tokens_are_blocks_of_four_latents():
    latents = torch.arange(2 * 3 * 4 * 6.0).view(2, 3, 4, 6)
    tokens = pack(latents)
    assert tokens.shape == (2, 6, 12)
    assert tokens[0, 0, :4].tolist() == latents[0, 0, :2, :2].flatten().tolist()
    assert torch.equal(unpack(tokens, 4, 6), latents)


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("gradient", ["both", "conditional"])
def test_guidance_joins_texts_of_unequal_length_and_is_rescaled(together, gradient):
    """The network here says how many words it was told; what is steered away from has 2, the prompts 5."""
    together = together and gradient == "both"

    def predict(latents, sigma, cond):
        counts = cond.text.shape[1] if cond.mask is None else cond.mask.sum(1).view(-1, 1, 1, 1)
        return torch.ones_like(latents) * counts

    latents, sigma, cond = torch.zeros(3, 1, 2, 2), torch.ones(3), text_of(3, 5)
    steered = guided(predict, latents, sigma, cond, Guidance(text_of(1, 2), 3.0, gradient), together)
    assert torch.equal(steered, torch.full_like(latents, 2 + 3 * (5 - 2)))
    rescaled = Guidance(text_of(1, 2), 3.0, gradient, lambda guided, wanted: guided - 10 * wanted)
    assert torch.equal(guided(predict, latents, sigma, cond, rescaled, together), torch.full_like(latents, 11 - 50))
    assert torch.equal(guided(predict, latents, sigma, cond, Guidance(None, 1.0, gradient), together), latents + 5)


def test_where_attention_is_watched_both_evaluations_share_a_batch_unless_that_pads_words():
    nothing = text_of(1, 4)
    for words, watched, expected in [(4, True, True), (5, True, False), (5, False, True)]:
        assert Guidance(nothing, 3.0, "both").together(text_of(2, words), watched) is expected
    assert not Guidance(nothing, 3.0, "conditional").together(text_of(2, 4), watched=False)
    assert not Guidance(nothing, 1.0, "both").together(text_of(2, 4), watched=False)
    assert not Guidance(None, 3.0, "both").together(text_of(2, 4), watched=False)
