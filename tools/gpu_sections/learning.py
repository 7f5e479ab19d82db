"""What training in fewer bits learns: autocast to bfloat16 and float16, and moments of 8 bits."""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Iterator, Mapping, Sequence

import torch

from aegpo.core.reports import StepReport
from aegpo.train.engine import Engine
from gpu_sections.networks import random_weights, sd3
from gpu_sections.sections import Job, Row, Value
from gpu_sections.steps import ROOT, SMALL, SUBJECTS, loaded, now, opened

STEPS = 12
ABLATION = ROOT / "experiments" / "ablation.yaml"
# The same eight prompts in every step, so that a few of them show whether anything is learned.
SAME_PROMPTS = {"prompts.train_count": 8, "prompts.evaluation_count": 2}
TINY = {
    "prompts.train_count": 2,
    "rollouts.prompts_per_step": 2,
    "rollouts.rollouts_per_step": 24,
    "rollouts.denoising_steps": 5,
    "optimizer.rollouts_per_update": 24,
}
EDGES = 3  # steps at the beginning and at the end that are compared
OVERFLOWS = 2  # steps that may be left out while the scale of gradients is found
APART = 0.05  # the mean rewards of a first step may differ by so much, of 1; before anything is learned


def precision(job: Job) -> Iterator[Row]:
    """The embedded model, then a small SD 3.5 whose frozen weights have fewer bits too; float32 first."""
    names = ("float32", "bfloat16") if job.dry else ("float32", "bfloat16", "float16")
    first: dict[str, Sequence[StepReport]] = {}
    for name in names:
        yield from _trained(job, "shapes", name, first)
    with random_weights(job.device, dry=True):
        for name in names:
            yield from _trained(job, "small sd3", name, first)
    if job.dry:
        yield {"what": "float16", "skipped": "its scaled gradients need a CUDA device"}


def _trained(job: Job, network: str, name: str, first: dict[str, Sequence[StepReport]]) -> Iterator[Row]:
    """Some steps in a precision; `first`: those in the first one, by network."""
    if network == "shapes":
        changes = {"device": job.device, "precision": name, **SAME_PROMPTS, **(TINY if job.dry else {})}
        experiment = loaded(ABLATION, "grpo", changes)
    else:
        bits = {"precision": name, "model.dtype": name}
        experiment = opened(job, SUBJECTS["sd35"], sd3(dry=True), {**SMALL, **bits})
    engine = Engine.build(experiment)
    begin = now(job.device)
    reports = [engine.step(number) for number in range(1, 1 + (2 if job.dry else STEPS))]
    seconds = (now(job.device) - begin) / len(reports)
    reference = first.setdefault(network, reports)
    said: dict[str, Value] = {
        "what": network,
        "precision": name,
        "steps": len(reports),
        "rollouts": int(sum(reports[0].counts)),
    }
    found, compared = learned(reports), beside(reports, reference)
    learns = network != "shapes" or job.dry or found["gain"] > 0
    fine = bool(
        learns
        and found["finite"]
        and found["steps_with_overflow"] <= OVERFLOWS
        and abs(compared["first_reward_off"]) <= APART
    )
    yield {**said, "step_seconds": round(seconds, 3), **found, **compared, "ok": fine}


def learned(reports: Sequence[StepReport]) -> dict[str, float]:
    """Whether all is finite, and how much the training reward rose."""
    rewards = [report.metrics["reward"] for report in reports]
    before, after = rewards[:EDGES], rewards[-EDGES:]
    norms = [report.metrics["grad_norm"] for report in reports]
    others = [value for report in reports for name, value in report.metrics.items() if name != "grad_norm"]
    return {
        "finite": all(map(math.isfinite, others)),
        "steps_with_overflow": sum(not math.isfinite(norm) for norm in norms),  # which float16 leaves out
        "first_reward": round(rewards[0], 5),
        "last_reward": round(rewards[-1], 5),
        "gain": round(sum(after) / len(after) - sum(before) / len(before), 5),
        "ratio_error": max(report.metrics.get("ratio_error", 0.0) for report in reports),
        "grad_norm": norms[0],
    }


def sound(found: Mapping[str, float]) -> bool:
    """True if all is finite, but for a few steps that float16 left out."""
    return bool(found["finite"]) and found["steps_with_overflow"] <= OVERFLOWS


def beside(reports: Sequence[StepReport], reference: Sequence[StepReport]) -> dict[str, float]:
    """How far a run is from another one of the same noise."""
    first, norm = (each[0].metrics for each in (reports, reference))
    rewards = ([report.metrics["reward"] for report in each] for each in (reports, reference))
    off = [one - other for one, other in zip(*rewards, strict=True)]
    return {
        "first_reward_off": round(off[0], 6),
        "worst_reward_off": round(max(map(abs, off)), 6),
        "grad_norm_ratio": round(first["grad_norm"] / norm["grad_norm"], 4),
    }


def moments(job: Job) -> Iterator[Row]:
    """Full fine-tuning with moments of 32 and of 8 bits: what is kept, and whether it learns."""
    for kept in ("float32", "8bit"):
        if kept == "8bit" and importlib.util.find_spec("bitsandbytes") is None:
            yield {"what": kept, "skipped": "bitsandbytes is not installed"}
            continue
        changes = {"device": job.device, "optimizer.moments": kept, **SAME_PROMPTS, **(TINY if job.dry else {})}
        engine = Engine.build(loaded(ABLATION, "grpo", changes))
        begin = time.perf_counter()
        reports = [engine.step(number) for number in range(1, 1 + (1 if job.dry else STEPS // 2))]
        seconds = (now(job.device) - begin) / len(reports)
        tensors = engine.state_dict()[0]
        found = learned(reports)
        yield {
            "what": kept,
            "model": "shapes",
            "steps": len(reports),
            "step_seconds": round(seconds, 3),
            "state_mib": round(sum(each.numel() * each.element_size() for each in tensors.values()) / 2**20, 2),
            "allocated_mib": None if job.dry else round(torch.cuda.memory_allocated() / 2**20, 1),
            **found,
            "ok": sound(found) and (job.dry or found["gain"] > 0),
        }
        del engine
