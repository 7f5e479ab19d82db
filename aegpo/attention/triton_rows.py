"""Entropy and log-sum-exp of attention rows as a Triton kernel: the scores once, no product with values.

Half the arithmetic of an attention call. Imported only where it is asked for, because it needs `triton`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit  # type: ignore[untyped-decorator]
def _rows_kernel(
    query: tl.tensor,
    key: tl.tensor,
    allowed: tl.tensor,
    bias: tl.tensor,
    entropy: tl.tensor,
    lse: tl.tensor,
    scale: tl.tensor,
    heads: tl.tensor,
    queries: tl.tensor,
    keys: tl.tensor,
    query_b: tl.tensor,
    query_h: tl.tensor,
    query_n: tl.tensor,
    query_d: tl.tensor,
    key_b: tl.tensor,
    key_h: tl.tensor,
    key_n: tl.tensor,
    key_d: tl.tensor,
    allowed_b: tl.tensor,
    allowed_h: tl.tensor,
    allowed_q: tl.tensor,
    allowed_k: tl.tensor,
    bias_b: tl.tensor,
    bias_h: tl.tensor,
    bias_q: tl.tensor,
    bias_k: tl.tensor,
    width: tl.constexpr,
    padded_width: tl.constexpr,
    rows_at_once: tl.constexpr,
    keys_at_once: tl.constexpr,
    has_allowed: tl.constexpr,
    has_bias: tl.constexpr,
) -> None:
    """One block of rows of one head: an online softmax that keeps sum_j e^(s_j - m) and sum_j e^(s_j - m) (s_j - m).

    With m the largest score, H = ln sum_j e^(s_j - m) - sum_j e^(s_j - m) (s_j - m) / sum_j e^(s_j - m), so that no
    large numbers cancel. Moving m to m' multiplies both sums by e^(m - m') after adding (m - m') times the first to
    the second.
    """
    head = tl.program_id(1)
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    row = tl.program_id(0) * rows_at_once + tl.arange(0, rows_at_once)
    dim = tl.arange(0, padded_width)
    q = tl.load(
        query + b * query_b + h * query_h + row[:, None] * query_n + dim[None, :] * query_d,
        mask=(row[:, None] < queries) & (dim[None, :] < width),
        other=0.0,
    )
    most = tl.full([rows_at_once], float("-inf"), tl.float32)
    total = tl.zeros([rows_at_once], tl.float32)
    moment = tl.zeros([rows_at_once], tl.float32)
    for start in range(0, keys, keys_at_once):
        column = start + tl.arange(0, keys_at_once)
        k = tl.load(
            key + b * key_b + h * key_h + dim[:, None] * key_d + column[None, :] * key_n,
            mask=(dim[:, None] < width) & (column[None, :] < keys),
            other=0.0,
        )
        scores = tl.dot(q, k, input_precision="ieee") * scale
        seen = (row[:, None] < queries) & (column[None, :] < keys)
        if has_bias:
            place = bias + b * bias_b + h * bias_h + row[:, None] * bias_q + column[None, :] * bias_k
            scores += tl.load(place, mask=seen, other=0.0)
        if has_allowed:
            place = allowed + b * allowed_b + h * allowed_h + row[:, None] * allowed_q + column[None, :] * allowed_k
            seen = seen & (tl.load(place, mask=seen, other=0) != 0)
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(most, tl.max(scores, axis=1))
        origin = tl.where(higher == float("-inf"), 0.0, higher)  # rows that have seen no key yet
        shift = tl.where(most == float("-inf"), 0.0, most - origin)
        centred = tl.where(seen, scores - origin[:, None], 0.0)
        weights = tl.where(seen, tl.exp(centred), 0.0)
        decay = tl.exp(shift)
        moment = decay * (moment + total * shift) + tl.sum(weights * centred, axis=1)
        total = decay * total + tl.sum(weights, axis=1)
        most = higher
    safe = tl.where(total == 0.0, 1.0, total)
    place = head.to(tl.int64) * queries + row
    tl.store(entropy + place, tl.log(safe) - moment / safe, mask=row < queries)
    tl.store(lse + place, most + tl.log(safe), mask=row < queries)


def entropy_of_rows(
    query: Tensor, key: Tensor, scale: float, allowed: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As `aegpo.attention.backends.measure_rows`; a row that may attend to no key has entropy 0 here."""
    batch, heads, queries, width = query.shape
    keys = key.shape[2]
    entropy = torch.empty((batch, heads, queries), dtype=torch.float32, device=query.device)
    lse = torch.empty_like(entropy)
    if not entropy.numel():
        return entropy, lse
    half = query.element_size() == 2 and key.dtype == query.dtype
    if not half:
        query, key = query.float(), key.float()
    hidden, added = _spread((batch, heads, queries, keys), allowed, bias)
    rows, wide = 128 if half else 64, width > 128  # blocks that fit in 100 KB of shared memory
    _rows_kernel[(triton.cdiv(queries, rows // 2 if wide else rows), batch * heads)](
        query,
        key,
        query if hidden is None else hidden,
        query if added is None else added,
        entropy,
        lse,
        scale,
        heads,
        queries,
        keys,
        *query.stride(),
        *key.stride(),
        *((0, 0, 0, 0) if hidden is None else hidden.stride()),
        *((0, 0, 0, 0) if added is None else added.stride()),
        width=width,
        padded_width=max(16, triton.next_power_of_2(width)),
        rows_at_once=rows // 2 if wide else rows,
        keys_at_once=32 if wide else 64,
        has_allowed=hidden is not None,
        has_bias=added is not None,
        num_warps=4,
        num_stages=2,
    )
    return entropy, lse


def _spread(
    whole: tuple[int, int, int, int], allowed: Tensor | None, bias: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Masks as views of the whole (batch, heads, queries, keys), of types that the kernel loads."""
    hidden = None if allowed is None else allowed.expand(whole).view(torch.uint8)
    return hidden, None if bias is None else bias.float().expand(whole)
