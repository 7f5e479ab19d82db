"""Attention entropy: the exact measure, with no score matrix in memory."""

from __future__ import annotations

import torch
from torch import Tensor

SCORES = 2**26  # entries of the score matrix that the portable form holds at once


def attention_entropy(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Entropy of every row of softmax(scale q k^T), in nats, never with the whole matrix in memory.

    With A the attention weights, H_i = -sum_j A_ij log A_ij = LSE_i - scale q_i . (sum_j A_ij k_j): on a CPU one
    attention call with the keys as values, and its log-sum-exp; elsewhere row by row, some rows at a time. The
    identity is elementary (ours); the measure is AEGPO's Sec. 3.

    Args:
        query: (B, heads, queries, d).
        key: (B, heads, keys, d).
        scale: factor of the scores.

    Returns:
        (B, heads, queries) float32, each in [0, ln(keys)] up to rounding.
    """
    query, key = query.float(), key.float()
    if query.device.type == "cpu":
        attended, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, key, 0.0, False, scale=scale
        )
        entropy: Tensor = lse - scale * (query * attended).sum(-1)
        return entropy
    rows_at_once = max(1, SCORES // (query.shape[0] * query.shape[1] * key.shape[2]))
    return torch.cat([_dense_entropy(rows, key, scale) for rows in torch.split(query, rows_at_once, dim=2)], dim=2)


def _dense_entropy(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """The same on any device, with the score matrix of the given rows in memory."""
    log_weights = (scale * query @ key.transpose(-2, -1)).log_softmax(dim=-1)
    return -(log_weights.exp() * log_weights).sum(-1)
