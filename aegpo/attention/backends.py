"""The ways to compute entropy and log-sum-exp of attention rows, none of which keeps the score matrix.

Every function takes query (B, heads, queries, d), key (B, heads, keys, d) and the factor of the scores, and returns
entropy and log-sum-exp, (B, heads, queries) float32 nats each. The private operators of torch are called here only.

"fused" is a CPU's attention operator, "chunked" plain torch on any device and the only one with gradients. On a GPU,
"cuda-efficient" is as exact and takes half the time of "chunked"; "cuda-flash" takes a fifth of that again, but rounds
the mean key to half precision, which moves a row by up to .05 nats and the mean over a head's rows by up to .001
(tools/BENCHMARKS.md), so it is for those who ask for it.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from aegpo.errors import AegpoError

Backend = Literal["auto", "fused", "cuda-flash", "cuda-efficient", "chunked"]

BACKENDS: tuple[Backend, ...] = ("auto", "fused", "cuda-flash", "cuda-efficient", "chunked")
EXCLUDED = -1e3  # an additive mask at or below this hides a key: e^-1000 is 0 in float64; diffusers writes -10000
CHUNK, CHUNKS = 2**25, {"cpu": 2**18}  # scores the chunked form holds at once; a CPU's cache is small
HALF = (torch.float16, torch.bfloat16)


def split_mask(mask: Tensor | None, keys: int) -> tuple[Tensor | None, Tensor | None]:
    """What a mask means: the keys a row may attend to (bool, None: all) and the finite bias (None: none).

    Both are (B or 1, heads or 1, queries or 1, keys).
    """
    if mask is None:
        return None, None
    mask = mask.reshape((1,) * (4 - mask.dim()) + mask.shape)
    mask = mask.expand(*mask.shape[:3], keys)
    if mask.dtype == torch.bool:
        return (None if bool(mask.all()) else mask), None
    allowed = mask > EXCLUDED
    bias = torch.where(allowed, mask, 0).float()
    return (None if bool(allowed.all()) else allowed), (bias if bool(bias.any()) else None)


def choose_backend(device: str, gradient: bool, bias_of_rows: bool) -> Backend:
    """What "auto" stands for: the fastest backend that is exact here.

    Args:
        device: the type of the tensors' device, such as ``cuda``.
        gradient: the entropy is differentiated.
        bias_of_rows: an additive bias differs between rows.
    """
    fast: dict[str, Backend] = {"cpu": "fused", "cuda": "cuda-efficient"}
    return "chunked" if gradient or bias_of_rows else fast.get(device, "chunked")


def measure_rows(
    query: Tensor, key: Tensor, scale: float, allowed: Tensor | None, bias: Tensor | None, backend: Backend
) -> tuple[Tensor, Tensor]:
    """Entropy and log-sum-exp of every row; where a row may attend to no key they are nan and -inf."""
    chosen = backend
    if backend == "auto":
        chosen = choose_backend(query.device.type, _needs_gradient(query, key), _differs_by_row(bias))
    _check(chosen, query, key, allowed, bias)
    with torch.autocast(query.device.type, enabled=False):  # of a network that is watched: scores must not be rounded
        if chosen == "chunked":
            entropy, lse = _chunked(query, key, scale, allowed, bias)
        else:
            entropy, lse = _keys_as_values(query, key, scale, allowed, bias, chosen)
    if allowed is None:
        return entropy, lse
    blind = ~allowed.any(dim=-1).expand(lse.shape)  # rows that may attend to no key
    return entropy.masked_fill(blind, math.nan), lse.masked_fill(blind, -math.inf)


def _check(backend: Backend, query: Tensor, key: Tensor, allowed: Tensor | None, bias: Tensor | None) -> None:
    device, problem = query.device.type, ""
    if backend not in BACKENDS:
        raise AegpoError(f"attention_entropy: no backend {backend!r}; known: {', '.join(BACKENDS)}")
    if backend == "fused" and device != "cpu":
        problem = f"runs on the cpu, the tensors are on {device!r}"
    elif backend in ("cuda-flash", "cuda-efficient") and device != "cuda":
        problem = f"runs on a cuda device, the tensors are on {device!r}"
    elif backend == "cuda-flash" and (query.dtype not in HALF or key.dtype != query.dtype):
        problem = f"takes float16 or bfloat16, the tensors are {str(query.dtype).removeprefix('torch.')}"
    elif backend == "cuda-flash" and not (allowed is None and bias is None):
        problem = "takes no mask"
    elif backend != "chunked" and _differs_by_row(bias):
        problem = "takes no additive bias that differs between rows"
    elif backend != "chunked" and _needs_gradient(query, key):
        problem = "carries no gradient, and one is asked for"
    if problem:
        raise AegpoError(f"attention_entropy: backend {backend!r} {problem}; choose 'auto' or 'chunked'")


def _needs_gradient(query: Tensor, key: Tensor) -> bool:
    return torch.is_grad_enabled() and (query.requires_grad or key.requires_grad)


def _differs_by_row(bias: Tensor | None) -> bool:
    return bias is not None and bias.shape[-2] != 1


# --- one attention call with the keys as values ----------------------------------------------------------------------


def _keys_as_values(
    query: Tensor, key: Tensor, scale: float, allowed: Tensor | None, bias: Tensor | None, backend: Backend
) -> tuple[Tensor, Tensor]:
    """With A the weights, H_i = LSE_i - scale q_i . (sum_j A_ij k_j), an elementary identity (ours)."""
    if backend != "cuda-flash":  # it takes half precision only; elsewhere rounding the mean key would cost accuracy
        query, key = query.float(), key.float()
    if bias is not None:  # as one more dimension of the keys, so that the identity covers it: s = scale q.k + b
        query = torch.cat([query, query.new_full((*query.shape[:-1], 1), 1 / scale)], dim=-1)
        key = torch.cat([key, bias.expand(*key.shape[:2], 1, key.shape[2]).transpose(-2, -1).to(key.dtype)], dim=-1)
    hidden = None if allowed is None else torch.where(allowed, 0.0, -math.inf).to(query.dtype)
    if backend == "fused":
        mean_key, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, key, 0.0, False, attn_mask=hidden, scale=scale
        )
    elif backend == "cuda-flash":
        mean_key, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, key, 0.0, False, False, scale=scale
        )
    else:
        mean_key, lse = _cuda_efficient(query, key, scale, hidden)
    return lse - scale * (query.float() * mean_key.float()).sum(-1), lse


def _cuda_efficient(query: Tensor, key: Tensor, scale: float, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
    """Its bias must be of full shape with rows aligned to 16 bytes, and its log-sum-exp comes padded."""
    rows, keys, width, pad = query.shape[2], key.shape[2], query.shape[-1], -query.shape[-1] % 4
    if pad:  # float32 heads must be a multiple of 4 wide; zeros add nothing to a product
        query, key = (torch.nn.functional.pad(side, (0, pad)) for side in (query, key))
    if hidden is not None:
        hidden = torch.nn.functional.pad(hidden, (0, -keys % 16))[..., :keys]
        hidden = hidden.expand(query.shape[0], query.shape[1], rows, keys)
    attended, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, key, hidden, True, 0.0, False, scale=scale
    )
    return attended[..., :width], lse[..., :rows]


# --- some rows at a time ---------------------------------------------------------------------------------------------


def _chunked(
    query: Tensor, key: Tensor, scale: float, allowed: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Dense rows, some at a time; they are computed again on the way back, so gradients cost no more memory."""
    rows_at_once = max(1, CHUNKS.get(query.device.type, CHUNK) // (query.shape[0] * query.shape[1] * key.shape[2]))
    differentiable = _needs_gradient(query, key)
    entropies, lses = [], []
    for start in range(0, query.shape[2], rows_at_once):
        rows = slice(start, start + rows_at_once)
        given = (query[:, :, rows], key, scale, _rows_of(allowed, rows), _rows_of(bias, rows))
        entropy, lse = checkpoint(_dense, *given, use_reentrant=False) if differentiable else _dense(*given)
        entropies.append(entropy)
        lses.append(lse)
    return torch.cat(entropies, dim=2), torch.cat(lses, dim=2)


def _rows_of(mask: Tensor | None, rows: slice) -> Tensor | None:
    return mask if mask is None or mask.shape[-2] == 1 else mask[..., rows, :]


def _dense(
    query: Tensor, key: Tensor, scale: float, allowed: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The rows with their scores in memory."""
    scores = scale * query.float() @ key.float().transpose(-2, -1)
    if bias is not None:
        scores = scores + bias
    if allowed is not None:  # a finite number, so that a row without keys has no nan in its gradient
        scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min / 2)
    most = scores.amax(dim=-1, keepdim=True).detach()
    scores = scores - most
    weights = scores.exp()
    total = weights.sum(dim=-1)
    return total.log() - (weights * scores).sum(dim=-1) / total, most[..., 0] + total.log()
