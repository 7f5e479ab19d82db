"""What the entropy probe would cost on a model of FLUX's size, by computation and by one attention call, not run."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from aegpo.attention.entropy import attention_entropy
from aegpo.core.experiment import Experiment
from aegpo.method.costs import cost
from aegpo.method.signals import EntropySignal

FLUX = {"tokens": 4608, "heads": 24, "width": 128, "layers": 19 + 38, "steps": 20}
# Multiply-adds of one token outside of attention: a two-stream block has 340 M weights of which a token meets half, a
# one-stream block has 141 M (diffusers' FluxTransformer2DModel, width 3072)
FLUX_TOKEN = 19 * 340e6 / 2 + 38 * 141e6
HEADS_TRIED = 2  # of FLUX's, for the measured ratio: cost is linear in heads


def flux_lines(experiment: Experiment) -> list[str]:
    """What the probe would cost on FLUX: forwards counted by plans, entropy by its ratio to one attention call."""
    tokens, heads, width = FLUX["tokens"], FLUX["heads"], FLUX["width"]
    ratios = {"all rows": call_ratio("all"), "256 rows": call_ratio(256), "64 rows": call_ratio(64)}
    attention = 2.0 * tokens**2 * heads * width * FLUX["layers"]
    tap = attention / (FLUX_TOKEN * tokens + attention)
    longer = experiment.rollouts.model_copy(update={"denoising_steps": FLUX["steps"]})
    fields = {name: getattr(experiment, name) for name in type(experiment).model_fields} | {"rollouts": longer}
    spent = {
        source: cost(
            type(experiment)(**{**fields, "signals": {"entropy": EntropySignal.model_validate({"source": source})}})
        )
        for source in ("probe", "rollout")
    }
    lines = [
        f"A FLUX-class model ({tokens} tokens, {heads} heads of {width}, {FLUX['layers']} layers, {FLUX['steps']} "
        f"denoising steps), by computation, not run: attention is {100 * tap:.0f} % of a forward's multiply-adds "
        f"({FLUX_TOKEN / 1e9:.1f} G a token elsewhere). Entropy of one call in multiples of a plain attention call, "
        f"float32 on this CPU, {HEADS_TRIED} heads: "
        + ", ".join(f"{ratio:.2f} for {name}" for name, ratio in ratios.items())
        + ". Work of a step is forwards + 3 x trained transitions, the middle of what plans can be; the probe's share "
        "of it, net of the forwards it saves the rollouts:",
        "",
        "| probe | first | again |",
        "| --- | ---: | ---: |",
    ]
    prompts = experiment.rollouts.prompts_per_step
    work = {source: (each.work.low + each.work.high) / 2 for source, each in spent.items()}
    for source in spent:
        saved = work["probe"] - work[source]
        for name, ratio in ratios.items():
            once = prompts * FLUX["steps"] * (1 + tap * ratio)
            costs = [times * once - saved for times in (2, 1)]
            shares = [100 * each / (work["probe"] + each) for each in costs]
            lines.append(f"| source {source}, {name} | {shares[0]:.1f} % | {shares[1]:.1f} % |")
    return [*lines, ""]


def call_ratio(rows: int | str) -> float:
    """Processor time of one call's entropy as a multiple of the attention call itself, best of three."""
    shape = (1, HEADS_TRIED, FLUX["tokens"], FLUX["width"])
    query, key, value = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
    chosen = None if rows == "all" else torch.randperm(FLUX["tokens"])[: int(rows)]
    scale = FLUX["width"] ** -0.5
    plain = best(lambda: torch.nn.functional.scaled_dot_product_attention(query, key, value))
    entropy = best(lambda: attention_entropy(query, key, scale=scale, rows=chosen))
    return entropy / plain


def best(work: Callable[[], object]) -> float:
    """Least processor time of three tries, after one to warm up."""
    spent = []
    for _ in range(4):
        begin = time.process_time()
        with torch.no_grad():
            work()
        spent.append(time.process_time() - begin)
    return min(spent[1:])
