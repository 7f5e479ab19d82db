"""What attention entropy costs and how exact it is: `tools/bench.py entropy`.

Times are multiples of one plain attention call on the same inputs, measured in turn within one run; the least of the
repetitions counts, of processor time on a CPU and of wall-clock on a GPU. Memory is what a call holds at most beyond
its inputs. Errors are against float64 on the same rounded inputs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aegpo.attention.entropy import Block, attention_entropy, measure_call, sample_rows
from aegpo.attention.tap import watch_attention
from aegpo.core.records import AttentionCall

TOKENS, WIDTHS, HEADS, ROWS = (256, 1024, 2304, 4096, 4608), (64, 128), 4, 64
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CHECKED = 512  # rows whose error is known
SPREAD = 3.0  # standard deviation of the scores
TEXT = 64  # the last tokens are text
MAX_EXACT, MAX_SAMPLED, MAX_GROWTH = 1.3, 0.1, 2.2
BLOCKS: tuple[Block, ...] = ("image-image", "image-text", "text-image", "text-text")
MiB = 2**20


@dataclass(frozen=True)
class Cost:
    """Of one way to measure, on one size."""

    ratio: float  # of the time of one plain attention call
    memory: float  # MiB
    row_error: float  # nats, the largest of a row
    mean_error: float  # nats, of the mean over rows, the largest of a head


def naive(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """With the whole matrix in memory, as one would write it down."""
    weights = (scale * query @ key.transpose(-2, -1)).float().softmax(dim=-1)
    return -(weights * weights.log().clamp(min=-1e30)).sum(dim=-1)


def float64(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """The truth."""
    log_weights = (scale * query.double() @ key.double().transpose(-2, -1)).log_softmax(dim=-1)
    return -(log_weights.exp() * log_weights).sum(dim=-1)


def ways(query: Tensor, key: Tensor, scale: float) -> dict[str, Callable[[], Tensor]]:
    """The measures that are compared on these inputs."""
    tokens = query.shape[2]
    rows = sample_rows(slice(0, tokens - TEXT), slice(tokens - TEXT, tokens), tokens, ROWS, seed=0).to(query.device)
    found: dict[str, Callable[[], Tensor]] = {
        "naive": lambda: naive(query, key, scale),
        "exact": lambda: attention_entropy(query, key, scale=scale),
        "chunked": lambda: attention_entropy(query, key, scale=scale, backend="chunked"),
        f"{ROWS} rows": lambda: attention_entropy(query, key, scale=scale, rows=rows),
    }
    return found


def costs(tokens: int, width: int, dtype: torch.dtype, device: str, repeats: int) -> tuple[float, dict[str, Cost]]:
    """Seconds of one attention call, and the cost of each way, for one sequence of several heads."""
    generator = torch.Generator().manual_seed(tokens + width)
    query, key, value = (torch.randn((1, HEADS, tokens, width), generator=generator) for _ in range(3))
    query, key, value = ((side).to(device, dtype) for side in (SPREAD * query, key, value))
    scale = 1 / math.sqrt(width)
    measures = ways(query, key, scale)
    timed = {"attention": lambda: F.scaled_dot_product_attention(query, key, value, scale=scale)} | measures
    seconds = least_seconds(timed, repeats, device)
    checked = torch.linspace(0, tokens - 1, min(tokens, CHECKED), device=device).long()
    truth = float64(query[:, :, checked], key, scale)
    all_rows = measures["exact"]().mean(-1)
    found = {}
    for name, measure in measures.items():
        memory, entropy = peak_memory(measure, device)
        if entropy.shape[-1] == tokens:
            entropy, expected = entropy[..., checked].double(), truth.mean(-1)
            error = (entropy - truth).abs().max().item()
        else:
            error, expected = math.nan, all_rows
        mean_error = (entropy.mean(-1) - expected).abs().max().item()
        found[name] = Cost(seconds[name] / seconds["attention"], memory, error, mean_error)
    return seconds["attention"], found


def least_seconds(timed: Mapping[str, Callable[[], object]], repeats: int, device: str) -> dict[str, float]:
    """The shortest of several calls each, made in turn."""
    best = dict.fromkeys(timed, math.inf)
    for _ in range(repeats + 1):
        for name, call in timed.items():
            often = 1 if best[name] > 0.02 else max(1, int(0.02 / max(best[name], 1e-4)))
            begin = now(device)
            for _ in range(often):
                call()
            best[name] = min(best[name], (now(device) - begin) / often)
    return best


def now(device: str) -> float:
    """Seconds: of this process on a CPU, on the wall once a GPU is done."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def peak_memory(call: Callable[[], Tensor], device: str) -> tuple[float, Tensor]:
    """MiB that a call holds at most beyond what there was before, and its result."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        return (torch.cuda.max_memory_allocated() - before) / MiB, result
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    return float(held.max(initial=0)) / MiB, result


# --- a whole network that is watched ---------------------------------------------------------------------------------


def flux() -> tuple[nn.Module, dict[str, Tensor]]:
    """A FLUX transformer of six layers, 8 heads of 64, 1,024 image and 64 text tokens, with random weights."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    network = FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=64,
        num_attention_heads=8,
        joint_attention_dim=256,
        pooled_projection_dim=256,
        guidance_embeds=False,
        axes_dims_rope=(16, 24, 24),
    ).eval()
    inputs = {
        "hidden_states": torch.randn(1, 1024, 64),
        "encoder_hidden_states": torch.randn(1, TEXT, 256),
        "pooled_projections": torch.randn(1, 256),
        "timestep": torch.full((1,), 0.5),
        "img_ids": torch.zeros(1024, 3),
        "txt_ids": torch.zeros(TEXT, 3),
    }
    return network, inputs


@contextmanager
def watching(network: nn.Module, tap: Callable[[AttentionCall], object] | None) -> Iterator[None]:
    """Inside, the tap sees the network's attention; None: nobody does."""
    if tap is None:
        yield
        return

    def show(call: AttentionCall) -> None:
        tap(call)

    with watch_attention(network, show):
        yield


@torch.no_grad()
def bench_forward(device: str, repeats: int) -> list[str]:
    """A forward with every layer measured, as a multiple of one without a tap."""
    network, inputs = flux()
    network.to(device)
    inputs = {name: value.to(device) for name, value in inputs.items()}
    taps: dict[str, Callable[[AttentionCall], object] | None] = {
        "no tap": None,
        "a tap that does nothing": lambda call: None,
        "joint, all rows": lambda call: measure_call(call, ["joint"]),
        "four blocks and their masses, all rows": lambda call: measure_call(call, BLOCKS),
        f"four blocks and their masses, {ROWS} rows": lambda call: measure_call(call, BLOCKS, rows=ROWS),
        f"image-text alone, {ROWS} rows": lambda call: measure_call(call, ["image-text"], rows=ROWS, masses=False),
    }

    def forward(tap: Callable[[AttentionCall], object] | None) -> None:
        with watching(network, tap):
            network(**inputs)

    seconds = least_seconds({name: partial(forward, tap) for name, tap in taps.items()}, repeats, device)
    size = sum(weight.numel() for weight in network.parameters()) / 1e6
    plain = seconds["no tap"]
    return [
        f"A whole forward of a FLUX transformer ({size:.0f} M weights, 6 layers of 8 heads of 64, 1,088 tokens, "
        f"float32, every layer measured; {1000 * plain:.0f} ms without a tap):",
        "",
        "| watched | forward / forward without a tap |",
        "| --- | ---: |",
        *(f"| {name} | {value / plain:.3f} |" for name, value in seconds.items() if name != "no tap"),
        "",
    ]


# --- the report ------------------------------------------------------------------------------------------------------


def bench_entropy(repeats: int) -> tuple[list[tuple[str, float, float]], list[str]]:
    """Figures (what, value, at most) and the tables behind them."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = {
        (name, width, tokens): costs(tokens, width, dtype, device, repeats)
        for (name, dtype), width, tokens in product(DTYPES.items(), WIDTHS, TOKENS)
    }
    exact = [cost["exact"].ratio for (name, _, _), (_, cost) in found.items() if name == "float32"]
    sampled = [
        cost[f"{ROWS} rows"].ratio
        for (name, _, tokens), (_, cost) in found.items()
        if name == "float32" and tokens >= 1024
    ]
    memory = {tokens: found["float32", 64, tokens][1]["exact"].memory for tokens in TOKENS}
    figures = [
        ("exact entropy / one attention call, float32, worst of all sizes", max(exact), MAX_EXACT),
        (f"{ROWS} rows / one attention call, float32, worst of N >= 1024", max(sampled), MAX_SAMPLED),
        ("extra memory of exact entropy, N = 4608 / N = 2304", memory[4608] / memory[2304], MAX_GROWTH),
    ]
    return figures, [*cost_table(found), *error_table(found), *bench_forward(device, repeats), *not_run(device)]


Found = Mapping[tuple[str, int, int], tuple[float, Mapping[str, Cost]]]


def cost_table(found: Found) -> list[str]:
    """Time and memory by size."""
    names = list(next(iter(found.values()))[1])
    lines = [
        "Time as a multiple of one plain attention call, and MiB held at most beside the inputs; one sequence, "
        f"{HEADS} heads. On a busy machine ratios are uncertain by some tens of per cent, so that some are below what "
        "arithmetic allows:",
        "",
        f"| precision | d | N | attention, ms | {' | '.join(names)} |",
        f"| --- | ---: | ---: | ---: |{' ---: |' * len(names)}",
    ]
    for (precision, width, tokens), (seconds, costs_of) in found.items():
        cells = [f"{cost.ratio:.2f}x, {cost.memory:.1f}" for cost in costs_of.values()]
        lines.append(f"| {precision} | {width} | {tokens} | {1000 * seconds:.2f} | {' | '.join(cells)} |")
    return [*lines, ""]


def error_table(found: Found) -> list[str]:
    """Errors of rows and means, the worst of all sizes."""
    names = [name for name in next(iter(found.values()))[1] if "rows" not in name]
    lines = [
        f"Error against float64 on the same rounded inputs, scores with standard deviation {SPREAD:.0f}, nats: the "
        f"worst row, and the worst mean over rows of a head, of {CHECKED} rows at all sizes:",
        "",
        f"| precision | {' | '.join(names)} |",
        f"| --- |{' ---: |' * len(names)}",
    ]
    for precision in DTYPES:
        here = [costs_of for (name, _, _), (_, costs_of) in found.items() if name == precision]
        cells = [
            f"{max(one[name].row_error for one in here):.1e}, {max(one[name].mean_error for one in here):.1e}"
            for name in names
        ]
        lines.append(f"| {precision} | {' | '.join(cells)} |")
    worst = max(costs_of[f"{ROWS} rows"].mean_error for _, costs_of in found.values())
    return [*lines, "", f"The mean of {ROWS} rows is off by {worst:.2f} nats at worst: what a sample is.", ""]


def not_run(device: str) -> list[str]:
    """What this machine cannot measure."""
    if device == "cuda":
        return []
    backends = "the CUDA backends (`cuda-flash`, `cuda-efficient`)"
    return [f"Not run: {backends}, because there is no GPU here; `python tools/gpu.py` runs them."]
