"""Attention entropy: the exact measure of rows, and of the blocks of image and text tokens that share a softmax."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from aegpo.attention.backends import HALF, Backend, measure_rows, split_mask
from aegpo.attention.row_samples import PARTS, Part, Rows, draw_rows, sample_rows, stratified_mean, token_parts
from aegpo.core.records import AttentionCall
from aegpo.errors import AegpoError

__all__ = ["Block", "Measurement", "attention_entropy", "blocks_of", "measure_call", "sample_rows", "stratified_mean"]

Block = Literal["joint", "image-image", "image-text", "text-image", "text-text", "self", "cross"]

JOINT_BLOCKS: dict[str, tuple[Part, Part]] = {  # whose rows, over whose keys
    "image-image": ("image", "image"),
    "image-text": ("image", "text"),
    "text-image": ("text", "image"),
    "text-text": ("text", "text"),
}


def attention_entropy(
    query: Tensor,
    key: Tensor,
    *,
    scale: float,
    mask: Tensor | None = None,
    rows: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Entropy of rows of softmax(scale q k^T + mask), in nats, never with the whole matrix in memory.

    With A the attention weights, H_i = -sum_j A_ij log A_ij = LSE_i - scale q_i . (sum_j A_ij k_j): one attention call
    with the keys as values, and its log-sum-exp. The identity is elementary (ours); the measure is AEGPO's Sec. 3.
    Gradients reach query and key if they ask for them.

    Args:
        query: (B, heads, queries, d).
        key: (B, heads, keys, d).
        scale: factor of the scores.
        mask: None, bool (True: attend) or additive float, broadcastable to (B, heads, queries, keys).
        rows: None for all, or the indices (rows,) of the query rows to measure.
        backend: "auto" chooses by device, mask and need of gradients, among those that are exact.

    Returns:
        (B, heads, rows) float32, each in [0, ln(keys)] up to rounding; nan where a row may attend to no key.

    Raises:
        AegpoError: shapes that do not fit, or a backend that cannot do what is asked.
    """
    _check_shapes(query, key)
    allowed, bias = split_mask(mask, key.shape[2])
    query, key = _centred(query, key)
    if rows is not None:
        query = query[:, :, rows]
        allowed, bias = (mask if mask is None or mask.shape[2] == 1 else mask[:, :, rows] for mask in (allowed, bias))
    return measure_rows(query, key, scale, allowed, bias, backend)[0]


@dataclass(frozen=True, eq=False)
class Measurement:
    """Entropy of one block of one attention call, over its rows that are not padding."""

    entropy: Tensor  # (B, heads) float32 nats, mean over rows; nan if there is no row or no key
    standard_error: Tensor  # (B, heads) float32 nats; 0 if every row was measured
    mass: Tensor | None  # (B, heads) in [0, 1], mean probability the rows give to the block's keys; None: not asked for
    valid_keys: Tensor  # (B,) int64, keys of the block that are not masked

    @property
    def normalised(self) -> Tensor:  # (B, heads)
        """Entropy as a share of ln(valid keys), which a uniform row has; nan where there is one key or none."""
        most = self.valid_keys.double().log()[:, None]
        return (self.entropy / torch.where(most > 0, most, math.nan)).float()


def blocks_of(call: AttentionCall) -> tuple[str, ...]:
    """The blocks that a call has."""
    return ("joint", *JOINT_BLOCKS) if call.kind == "joint" else (call.kind,)


def measure_call(
    call: AttentionCall,
    blocks: Sequence[Block],
    *,
    rows: Rows = "all",
    seed: int = 0,
    masses: bool = True,
    backend: Backend = "auto",
) -> Mapping[Block, Measurement]:
    """Entropies of those of the given blocks that the call has.

    "image-text" is the image rows with the softmax renormalised over the text keys; its mass is what the rows give to
    these keys. Masked keys never count, and rows of padding tokens are left out. One pass over the keys of each part
    gives H_b and LSE_b; with m_b = exp(LSE_b - LSE) the whole row has H = sum_b m_b (H_b - ln m_b), the chain rule of
    entropy, so that all five blocks together cost what "joint" costs.

    Args:
        call: the attention.
        blocks: which blocks to measure.
        rows: how many rows to measure, drawn among those of the given blocks as `sample_rows` does; or "all".
        seed: of the draw.
        masses: False leaves the masses out, so that a block costs its own keys only.
        backend: as in `attention_entropy`, whose errors it raises, and those of `sample_rows`.
    """
    wanted = [block for block in dict.fromkeys(blocks) if block in blocks_of(call)]
    if not wanted:
        return {}
    _check_shapes(call.query, call.key)
    allowed, bias = split_mask(call.mask, call.key.shape[2])
    drawn = _draw(call, wanted, allowed, rows, seed)
    keys_of = _key_parts(call, wanted, masses)
    query, key = _centred(call.query, call.key)
    query = _take_rows(query, drawn.index)
    some_allowed, some_bias = _mask_rows(allowed, drawn.index), _mask_rows(bias, drawn.index)
    passes: dict[Part, tuple[Tensor, Tensor]] = {}
    for part, keys in keys_of.items():
        block_mask = _mask_keys(some_allowed, keys), _mask_keys(some_bias, keys)
        passes[part] = measure_rows(query, _select(key, keys), call.scale, *block_mask, backend)
    return {block: _of_block(block, passes, drawn, keys_of, allowed, masses) for block in wanted}


def _of_block(
    block: Block,
    passes: Mapping[Part, tuple[Tensor, Tensor]],
    drawn: _Drawn,
    keys_of: Mapping[Part, Tensor],
    allowed: Tensor | None,
    masses: bool,
) -> Measurement:
    """One block's entropies out of the passes over its parts."""
    row_parts, key_parts = _extent(block, drawn.strata, keys_of)
    values, share = _combined(passes, key_parts)
    keys = torch.cat([keys_of[part] for part in key_parts])
    seen = _mask_keys(allowed, keys)  # (B or 1, heads or 1, queries or 1, keys) bool or None
    entropy, error = drawn.mean(values, row_parts, None if seen is None else seen.any(-1).any(1))
    mass = drawn.mean(share, row_parts, None)[0] if masses else None
    return Measurement(entropy, error, mass, _valid_keys(seen, drawn, row_parts, len(keys), len(values)))


# --- which rows and keys a block takes -------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Drawn:
    """The rows of a call that are measured."""

    strata: dict[Part, Tensor]  # indices of the rows of each kind of token
    real: Tensor  # (B or 1, queries) bool, False: padding
    index: Tensor  # (B or 1, rows) int64, the measured rows
    counted: Tensor  # (B or 1, rows) bool, False: only there because another sample has more rows
    every: bool  # all rows are measured

    def mean(self, values: Tensor, parts: Sequence[Part], seeing: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mean and error of values (B, heads, rows) over some parts' rows, of which (B or 1, queries or 1) count."""
        of_row = torch.full(self.real.shape[-1:], -1, device=values.device)
        for number, part in enumerate(parts):
            of_row[self.strata[part]] = number
        counts = self.real if seeing is None else self.real & seeing
        population = torch.where(counts, of_row, -1)  # (B or 1, queries)
        index = self.index.expand(len(population), -1) if len(self.index) == 1 else self.index
        population = population.expand(len(index), -1)
        stratum = torch.where(self.counted, population.gather(1, index), -1)
        sizes = torch.stack([(population == number).sum(-1) for number in range(len(parts))], dim=-1)
        return stratified_mean(values, stratum, sizes, self.every)


def _draw(call: AttentionCall, wanted: Sequence[Block], allowed: Tensor | None, rows: Rows, seed: int) -> _Drawn:
    """Rows of the parts that the blocks read, leaving padding out; for each sample its own where they differ."""
    nothing, queries, device = slice(0, 0), call.query.shape[2], call.query.device
    parts = token_parts(call.image, nothing if call.kind == "cross" else call.text, queries)
    used = {JOINT_BLOCKS[block][0] for block in wanted if block in JOINT_BLOCKS}
    if len(used) == 0 or any(block not in JOINT_BLOCKS for block in wanted):
        used = set(PARTS)
    strata = {part: index for part, index in parts.items() if part in used}
    real = _real_rows(call, allowed)
    every = torch.cat(list(strata.values())).sort().values
    whole = rows == "all" or rows >= len(every)
    if whole:
        index, counted = every[None], torch.ones((1, len(every)), dtype=torch.bool)
    else:
        drawn = [draw_rows([part[row[part]] for part in strata.values()], rows, seed) for row in real.cpu()]
        longest = max(len(index) for index in drawn)
        index = torch.stack([F.pad(index, (0, longest - len(index))) for index in drawn])
        counted = torch.stack([torch.arange(longest) < len(index) for index in drawn])
    strata = {part: index.to(device) for part, index in strata.items()}
    return _Drawn(strata, real, index.to(device), counted.to(device), whole)


def _real_rows(call: AttentionCall, allowed: Tensor | None) -> Tensor:
    """(B or 1, queries): rows that may attend to a key and, in self-attention, whose token is attended to."""
    queries = call.query.shape[2]
    if allowed is None:
        return torch.ones((1, queries), dtype=torch.bool, device=call.query.device)
    real = allowed.any(dim=-1).any(dim=1).expand(-1, queries)
    return real if call.kind == "cross" else real & allowed.any(dim=2).any(dim=1)


def _key_parts(call: AttentionCall, wanted: Sequence[Block], masses: bool) -> dict[Part, Tensor]:
    """The keys that need a pass each: one for all of them unless a block asks for some."""
    keys, device = call.key.shape[2], call.key.device
    if not any(block in JOINT_BLOCKS for block in wanted):
        return {"rest": torch.arange(keys, device=device)}
    parts = {part: index.to(device) for part, index in token_parts(call.image, call.text, keys).items()}
    if masses or "joint" in wanted:
        return parts
    return {part: index for part, index in parts.items() if part in {JOINT_BLOCKS[block][1] for block in wanted}}


def _extent(
    block: Block, strata: Mapping[Part, Tensor], keys_of: Mapping[Part, Tensor]
) -> tuple[list[Part], list[Part]]:
    """The kinds of token whose rows and whose keys are in a block."""
    if block in JOINT_BLOCKS:
        rows, keys = JOINT_BLOCKS[block]
        return [rows], [keys]
    return list(strata), list(keys_of)


def _combined(passes: Mapping[Part, tuple[Tensor, Tensor]], parts: Sequence[Part]) -> tuple[Tensor, Tensor]:
    """Entropy over the keys of some parts, and the probability given to these, (B, heads, rows) each."""
    if len(passes) == 1:  # of all keys
        ((known, total),) = passes.values()
        return known, torch.where(total == -math.inf, math.nan, 1.0)
    lse = {part: lse for part, (_, lse) in passes.items()}
    here = torch.stack([lse[part] for part in parts]).logsumexp(dim=0)
    entropy = torch.zeros_like(here)
    for part in parts:
        share = (lse[part] - here).exp()
        entropy = entropy + torch.where(share > 0, share * (passes[part][0] - share.log()), 0)
    blind = here == -math.inf
    return entropy.masked_fill(blind, math.nan), (here - torch.stack(list(lse.values())).logsumexp(dim=0)).exp()


def _valid_keys(seen: Tensor | None, drawn: _Drawn, parts: Sequence[Part], keys: int, batch: int) -> Tensor:
    """(B,): keys of a block that some row of it may attend to."""
    if seen is None:
        return torch.full((batch,), keys, device=drawn.index.device)
    if seen.shape[2] != 1:
        seen = seen[:, :, torch.cat([drawn.strata[part] for part in parts])]
    return seen.any(dim=2).any(dim=1).sum(-1).expand(batch)


# --- tensors ---------------------------------------------------------------------------------------------------------


def _check_shapes(query: Tensor, key: Tensor) -> None:
    same = query.dim() == key.dim() == 4 and query.shape[:2] == key.shape[:2] and query.shape[3] == key.shape[3]
    if not same or key.shape[2] == 0:
        raise AegpoError(
            f"attention_entropy: query {tuple(query.shape)} and key {tuple(key.shape)} do not fit; they should be "
            "(B, heads, queries, d) and (B, heads, keys, d) with at least one key"
        )


def _centred(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Float32, the keys about their mean, which changes no softmax and spares digits; halves on a GPU stay."""
    if key.dtype in HALF and key.device.type == "cuda":
        return query, key
    key = key.float()
    return query.float(), key - key.mean(dim=2, keepdim=True)


def _select(tensor: Tensor, index: Tensor, dim: int = 2) -> Tensor:
    """The given sorted indices of a dimension; a view where they are contiguous."""
    start, count = int(index[0]), len(index)
    if int(index[-1]) - start + 1 == count:
        return tensor.narrow(dim, start, count)
    return tensor.index_select(dim, index)


def _take_rows(query: Tensor, index: Tensor) -> Tensor:
    """(B, heads, queries, d), (B or 1, rows) -> (B, heads, rows, d)."""
    if len(index) == 1:
        return _select(query, index[0])
    return query.gather(2, index[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3]))


def _mask_rows(mask: Tensor | None, index: Tensor) -> Tensor | None:
    """Those rows of a mask (B or 1, heads or 1, queries or 1, keys)."""
    if mask is None or mask.shape[2] == 1:
        return mask
    return _take_rows(mask.expand(max(len(mask), len(index)), -1, -1, -1), index)


def _mask_keys(mask: Tensor | None, keys: Tensor) -> Tensor | None:
    return None if mask is None else _select(mask, keys, dim=3)
