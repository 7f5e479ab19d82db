"""Attention entropy on a GPU: how exact each backend is, what it costs beside flash attention, and what it holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from bench_entropy import float64, least_seconds, peak_memory
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from aegpo.attention.backends import Backend
from aegpo.attention.entropy import attention_entropy
from gpu_sections.sections import Job, Row

CHECKED = 256  # rows whose error is known
SPREAD = 3.0  # standard deviation of the scores
SAMPLED = 512  # rows, as flux_aegpo.yaml measures
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
REPEATS = 3
# The worst row and the worst mean over rows of a head, nats. Measured on a CPU: 1e-5 and 2e-7 in float32; with the
# mean key rounded to bfloat16, as flash attention rounds it, 2e-2 and 3e-4 (scores of standard deviation 3).
BOUNDS: dict[str, tuple[float, float]] = {"cuda-flash": (0.1, 5e-3)}
EXACT = (1e-3, 1e-4)


@dataclass(frozen=True)
class Attention:
    """The size of one attention call."""

    name: str
    heads: int
    tokens: int
    width: int


SIZES = (
    Attention("SD 3.5 at 512", 24, 1024 + 77 + 128, 64),
    Attention("FLUX at 720", 24, 2025 + 512, 128),
    Attention("FLUX at 1024", 24, 4096 + 512, 128),
)
SMALL = (Attention("small", 2, 96, 16), Attention("small", 2, 131, 40))


def entropy(job: Job) -> Iterator[Row]:
    """Errors first, with and without masks; then times and memory."""
    sizes = SMALL if job.dry else SIZES
    yield from masked(job)
    for size in sizes:
        for name, dtype in DTYPES.items():
            yield from errors(job, size, name, dtype)
    for size in sizes:
        for name, dtype in DTYPES.items():
            yield costs(job, size, name, dtype)


def backends(job: Job, dtype: torch.dtype) -> tuple[Backend, ...]:
    """Those that take such tensors without a mask."""
    if job.dry:
        return ("fused", "chunked")
    return ("cuda-flash", "cuda-efficient", "chunked") if dtype != torch.float32 else ("cuda-efficient", "chunked")


def drawn(job: Job, size: Attention, dtype: torch.dtype, batch: int = 1) -> tuple[Tensor, Tensor, float]:
    """Query, key and the factor of the scores, whose standard deviation is SPREAD."""
    generator = torch.Generator().manual_seed(size.tokens)
    shape = (batch, size.heads, size.tokens, size.width)
    query, key = (torch.randn(shape, generator=generator).to(job.device, dtype) for _ in range(2))
    return SPREAD * query, key, 1 / math.sqrt(size.width)


# --- how exact -------------------------------------------------------------------------------------------------------


def errors(job: Job, size: Attention, name: str, dtype: torch.dtype) -> Iterator[Row]:
    """Of each backend against float64 on the same rounded inputs."""
    query, key, scale = drawn(job, size, dtype)
    rows = torch.linspace(0, size.tokens - 1, min(size.tokens, CHECKED), device=job.device).long()
    truth = float64(query[:, :, rows], key, scale)
    for backend in backends(job, dtype):
        found = attention_entropy(query, key, scale=scale, backend=backend)[:, :, rows]
        yield {"what": "error", **_said(size, name), "backend": backend, **_off(found, truth, backend)}


def masked(job: Job) -> Iterator[Row]:
    """Padding keys, a bias of keys and a head whose width is no multiple of 4, against float64."""
    size = Attention("padded", 4, 77 if job.dry else 333, 42)
    query, key, scale = drawn(job, size, torch.float32, batch=2)
    allowed = torch.ones((2, 1, 1, size.tokens), dtype=torch.bool, device=job.device)
    allowed[0, ..., size.tokens // 2 :] = False
    bias = torch.linspace(-2, 2, size.tokens, device=job.device).expand(2, 1, 1, -1)
    for what, mask in {"padding": allowed, "bias of keys": bias}.items():
        added = torch.where(allowed, 0.0, -math.inf) if mask.dtype == torch.bool else mask
        log_weights = (scale * query.double() @ key.double().transpose(-2, -1) + added).log_softmax(dim=-1)
        truth = -(log_weights.exp() * log_weights.masked_fill(log_weights == -math.inf, 0)).sum(dim=-1)
        for backend in backends(job, torch.float32):
            found = attention_entropy(query, key, scale=scale, mask=mask, backend=backend)
            row = {"what": f"error with {what}", **_said(size, "float32"), "backend": backend}
            yield row | dict(_off(found, truth, backend))


def _off(found: Tensor, truth: Tensor, backend: str) -> Row:
    worst = (found.double() - truth).abs().max().item()
    mean = (found.double().mean(-1) - truth.mean(-1)).abs().max().item()
    most = BOUNDS.get(backend, EXACT)
    bounds = {"worst_row_at_most": most[0], "worst_mean_at_most": most[1]}
    return {"worst_row": worst, "worst_mean": mean, **bounds, "ok": worst <= most[0] and mean <= most[1]}


def _said(size: Attention, dtype: str) -> Row:
    return {"size": size.name, "dtype": dtype, "heads": size.heads, "tokens": size.tokens, "width": size.width}


# --- how dear --------------------------------------------------------------------------------------------------------


def costs(job: Job, size: Attention, name: str, dtype: torch.dtype) -> Row:
    """Times as multiples of a plain attention call, which is flash attention in bfloat16 on a GPU; and MiB held."""
    query, key, scale = drawn(job, size, dtype)
    value, half = torch.randn_like(key), dtype if job.dry else torch.bfloat16
    plain_query, plain_key, plain_value = (side.to(half) for side in (query, key, value))

    def attend() -> Tensor:
        flash: AbstractContextManager[object] = nullcontext() if job.dry else sdpa_kernel(SDPBackend.FLASH_ATTENTION)
        with flash:
            return F.scaled_dot_product_attention(plain_query, plain_key, plain_value, scale=scale)

    measures = _measures(job, query, key, scale, dtype)
    seconds = least_seconds({"attention": attend, **measures}, REPEATS, job.device)
    ratios = {f"{way}_ratio": round(seconds[way] / seconds["attention"], 3) for way in measures}
    held = {f"{way}_mib": round(peak_memory(measure, job.device)[0], 1) for way, measure in measures.items()}
    return {
        "what": "cost",
        **_said(size, name),
        "attention_ms": round(1000 * seconds["attention"], 4),
        **ratios,
        **held,
    }


def _measures(
    job: Job, query: Tensor, key: Tensor, scale: float, dtype: torch.dtype
) -> dict[str, Callable[[], Tensor]]:
    chosen = torch.linspace(0, query.shape[2] - 1, min(query.shape[2], SAMPLED), device=job.device).long()

    def whole(backend: Backend) -> Callable[[], Tensor]:
        return lambda: attention_entropy(query, key, scale=scale, backend=backend)

    def some(backend: Backend) -> Callable[[], Tensor]:
        return lambda: attention_entropy(query, key, scale=scale, rows=chosen, backend=backend)

    measures = {backend: whole(backend) for backend in backends(job, dtype)}
    return measures | {f"{backend}_{len(chosen)}_rows": some(backend) for backend in backends(job, dtype)}
