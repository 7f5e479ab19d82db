"""A training step of the experiments for real models, at full resolution, on full-size random weights: time and memory.

What a step of these weights decides means nothing. What it costs is what one of the published weights costs, but for
decisions: random weights have nearly uniform attention, so peaks of entropy lie anywhere.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from unittest.mock import patch

import torch

import aegpo.train.engine
from aegpo.config.loading import load_experiment_file
from aegpo.core.experiment import Experiment
from aegpo.core.reports import StepReport
from aegpo.models.pipeline.model import PipelineModel
from aegpo.plugin.manager import load_registries, plugin_manager
from aegpo.rewards.learned import LearnedReward
from aegpo.train.engine import Engine
from aegpo.train.stopwatch import Stopwatch
from gpu_sections.flops import Flops
from gpu_sections.networks import Pipeline, flux, random_weights, sd3, write, write_scorer
from gpu_sections.sections import Job, Row, Value

ROOT = Path(__file__).resolve().parents[2]
GiB = 2**30
ROOF = 989e12  # FLOP/s of an H100 or H200 SXM in dense bfloat16 (data sheet)
AIM = 0.4  # of it
COUNTED = 1 / 24  # share of the blocks of the network whose FLOPs are counted: a counter slows a step down
LONG = 60.0  # seconds from which a step needs no other one to warm up
SLACK = 1.5  # a step may take so many times what its forwards promise
# Four, of which a step asks two: those of the second one are new to the probe, as all are in the files.
TRAIN = ("a red circle", "two blue squares on the right", "a cube above a circle", "four purple circles")
HELD_OUT = ("four green circles",)
TWO_PROMPTS = {"prompts_per_step": 2, "rollouts_per_step": 24}
SMALL = {
    "model.height": 16,
    "model.width": 16,
    "model.max_sequence_length": 16,
    "rollouts.denoising_steps": 6,
    "optimizer.micro_batch": 8,
}


@dataclass(frozen=True)
class Subject:
    """An experiment, and the pipeline it is for."""

    file: str
    arm: str
    make: Callable[[bool, float], Pipeline]


SUBJECTS = {"sd35": Subject("sd35_aegpo", "aegpo", sd3), "flux": Subject("flux_aegpo", "lora", flux)}


def sd35_step(job: Job) -> Iterator[Row]:
    """SD 3.5 Medium with LoRA, AEGPO."""
    yield from step_of(job, SUBJECTS["sd35"])


def flux_step(job: Job) -> Iterator[Row]:
    """FLUX.1-dev with LoRA, AEGPO."""
    yield from step_of(job, SUBJECTS["flux"])


def step_of(job: Job, subject: Subject) -> Iterator[Row]:
    """FLOPs by a counter on few blocks, a forward, and whole steps with as many blocks as there is time for."""
    with random_weights(job.device, job.dry):
        engine, experiment, row = built(job, subject, COUNTED)
        counts, ratios = yield from counted(engine, row)
        del engine
        engine, experiment, row = built(job, subject, 1.0)
        whole, seconds = forward_flops(engine), forward_seconds(engine)
        yield {"what": "forward", **row, **of_forward(job, experiment, whole, seconds)}
        expected, share = expected_seconds(experiment, counts, seconds), 1.0
        if job.dry or expected > job.left:  # dry: so that this way is walked, too
            share = 0.5 if job.dry else job.left / expected / 2
            del engine
            engine, experiment, row = built(job, subject, share)
        unit = forward_flops(engine)
        warm = expected * share < min(LONG, job.left / 3)
        if warm:
            _, ratios = yield from counted(engine, row)
        begin = now(job.device)
        with peaks_by_stage(job.device) as peaks:
            report = engine.step(2)
        took = now(job.device) - begin
        found = {"what": "step", **row, "warmed": warm, **of_step(job, report, took, unit, ratios)}
        yield {**found, **in_gib(peaks), **of_all_blocks(report, took, whole / unit)}
        del engine
        yield from memory(job, subject, share, expected * share)


def memory(job: Job, subject: Subject, share: float, expected: float) -> Iterator[Row]:
    """A short step that retains nothing, beside what `aegpo check` estimates of one, which leaves that out too."""
    if not job.dry and job.left < expected:
        yield {"what": "memory", "skipped": f"{job.left:.0f} s are left, a step may take {expected:.0f}"}
        return
    engine, experiment, row = built(job, subject, share, {"optimizer.retain": "never", "rollouts.denoising_steps": 5})
    with peaks_by_stage(job.device) as peaks:
        engine.step(1)
    yield {"what": "memory", **row, **in_gib(peaks), **of_memory(engine, experiment, peaks)}


# --- what is measured ------------------------------------------------------------------------------------------------


def built(
    job: Job, subject: Subject, share: float, more: Mapping[str, object] = MappingProxyType({})
) -> tuple[Engine, Experiment, Row]:
    """An engine on a share of the network's blocks, and what it is."""
    gc.collect()
    if job.device == "cuda":
        torch.cuda.empty_cache()
    pipeline, begin = subject.make(job.dry, share), time.monotonic()
    experiment = opened(job, subject, pipeline, more)
    engine = Engine.build(experiment)
    weights = sum(weight.numel() for weight in engine.policy.model.policy.parameters())
    spec, layers = experiment.rollouts, (pipeline.transformer.get(name, 0) for name in ("num_layers", BRANCH))
    row: dict[str, Value] = {
        "experiment": f"{subject.file} {subject.arm}",
        "blocks": "+".join(str(number) for number in layers if number),
        "weights_millions": round(weights / 1e6, 1),
        "latents": "x".join(map(str, engine.policy.latent_shape)),
        "prompts": spec.prompts_per_step,
        "rollouts": spec.rollouts_per_step,
        "denoising_steps": spec.denoising_steps,
        "build_seconds": round(time.monotonic() - begin, 1),
    }
    return engine, experiment, row


BRANCH = "num_single_layers"


def opened(job: Job, subject: Subject, pipeline: Pipeline, more: Mapping[str, object]) -> Experiment:
    """One arm of an experiment as its file has it, but for prompts, places and what `more` says."""
    folder = job.folder / f"pipeline-{len(list(job.folder.glob('pipeline-*')))}"
    scorer = job.folder / "scorer"
    if not scorer.exists():
        scorer.mkdir()
        write_scorer(scorer)
        for name, texts in (("train", TRAIN), ("evaluation", HELD_OUT)):
            (job.folder / f"{name}.txt").write_text("\n".join(texts), encoding="utf-8")
    changes: dict[str, object] = {
        "device": job.device,
        "model.path": write(pipeline, folder),
        **{f"prompts.{name}": job.folder / f"{name}.txt" for name in ("train", "evaluation")},
        **{f"rollouts.{name}": count for name, count in TWO_PROMPTS.items()},
        "optimizer.rollouts_per_update": TWO_PROMPTS["rollouts_per_step"] // 2,
        "rewards.0.path": scorer / "none.safetensors",
        "rewards.0.tokenizer": scorer,
        "evaluation.rewards": [],
        **(SMALL if job.dry else {}),
        **more,
    }
    return loaded(ROOT / "experiments" / f"{subject.file}.yaml", subject.arm, changes)


def loaded(path: Path, arm: str, changes: Mapping[str, object]) -> Experiment:
    """One arm of a file with some of its values changed."""
    overrides = [f"{name}={value}" for name, value in changes.items()]
    return load_experiment_file(path, load_registries(plugin_manager()), overrides).arms[arm]


def forward_flops(engine: Engine) -> float:
    """FLOPs of one velocity, with guidance where there is any."""
    with Flops() as counter:
        _forward(engine, 1)
    return float(counter.get_total_flops())


def forward_seconds(engine: Engine) -> float:
    """Seconds of a velocity call of a whole micro-batch, the best of three after one."""
    device, best = engine.policy.device.type, math.inf
    for _ in range(4):
        begin = now(device)
        _forward(engine, engine.policy.micro_batch)
        best = min(best, now(device) - begin)
    return best


@torch.no_grad()
def _forward(engine: Engine, latents: int) -> None:
    policy = engine.policy
    cond = policy.encode([*engine.asked(1)[:1]] * latents)
    noise = torch.randn((latents, *policy.latent_shape), device=policy.device)
    policy.velocity(noise, policy.sigmas[:1].expand(latents), cond)


def now(device: str) -> float:
    """Seconds on the wall, once the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def useful_flops(counts: Mapping[str, float], unit: float) -> float:
    """Those of a step that its plan asks for: forwards, and three of them for each trained edge."""
    return unit * (counts["forwards"] + counts["signal_forwards"] + 3 * counts["trained_edges"])


def expected_seconds(experiment: Experiment, counts: Mapping[str, float], seconds: float) -> float:
    """Of a step with such counts, from the seconds of a micro-batch; edges are computed twice on their way back."""
    forwards = counts["forwards"] + counts["signal_forwards"] + 4 * counts["trained_edges"]
    return SLACK * seconds * forwards / experiment.rollouts.latents_at_once


Counts = Mapping[str, float]


def counted(engine: Engine, row: Row) -> Generator[Row, None, tuple[Counts, Counts]]:
    """A row with the FLOPs that stages of step 1 really take, as multiples of those its plan asks for.

    Less than 1 where one forward serves several edges, more where it is made again. Returns the step's counts, and
    these ratios by stage.
    """
    unit, found = forward_flops(engine), dict[str, float]()
    with Flops() as counter:
        before = 0

        def book(stages: Sequence[str]) -> None:
            nonlocal before
            before, spent = counter.get_total_flops(), counter.get_total_flops() - before
            for stage in stages:
                found[stage] = found.get(stage, 0.0) + spent

        with watched(book):
            counts = engine.step(1).metrics
    useful = {"signals": counts["signal_forwards"], "update": 3 * counts["trained_edges"]}
    ratios = {stage: round(found[stage] / unit / useful[stage], 3) for stage in useful}
    yield {"what": "counted", **row, **{f"{stage}_flops_over_useful": ratio for stage, ratio in ratios.items()}}
    return counts, ratios


@contextmanager
def peaks_by_stage(device: str) -> Iterator[dict[str, float]]:
    """Inside, GiB that a step holds at most, by stage; nothing on a CPU."""
    found: dict[str, float] = {}

    def book(stages: Sequence[str]) -> None:
        if device == "cuda":
            peak = torch.cuda.max_memory_allocated() / GiB
            found.update({stage: max(found.get(stage, 0.0), peak) for stage in stages})
            torch.cuda.reset_peak_memory_stats()

    with watched(book):
        yield found


@contextmanager
def watched(book: Callable[[Sequence[str]], None]) -> Iterator[None]:
    """Inside, `book` is told wherever a stage of a step begins or ends, with the stages that went on up to there."""
    stages: list[str] = []

    class Watch(Stopwatch):
        @contextmanager
        def __call__(self, stage: str) -> Iterator[None]:
            book(stages)
            stages.append(stage)
            with super().__call__(stage):
                yield
            book(stages)
            stages.remove(stage)

    with patch.object(aegpo.train.engine, "Stopwatch", Watch):
        yield


# --- rows ------------------------------------------------------------------------------------------------------------


def of_forward(job: Job, experiment: Experiment, unit: float, seconds: float) -> Row:
    """What a forward says."""
    size = experiment.rollouts.latents_at_once
    return {
        "latents_at_once": size,
        "tflop_of_one": round(unit / 1e12, 6),
        "forward_seconds": round(seconds, 4),
        "roof_share": roof_share(job, unit * size, seconds),
    }


def of_step(job: Job, report: StepReport, took: float, unit: float, ratios: Counts) -> Row:
    """What a step says about time; shares of the roof are of FLOPs that were really taken, by a counter's ratios."""
    counts, stages, rollouts = report.metrics, report.seconds, int(sum(report.counts))
    sampled, learned = unit * counts["forwards"], 3 * unit * counts["trained_edges"] * ratios["update"]
    spent = sampled + learned + unit * counts["signal_forwards"] * ratios["signals"]
    return {
        "step_seconds": round(took, 3),
        **{f"{stage}_seconds": round(seconds, 3) for stage, seconds in stages.items()},
        "probe_share": round(stages["signals"] / took, 4),
        "images_per_second": round(rollouts / took, 3),
        **{name: int(counts[name]) for name in ("forwards", "signal_forwards", "trained_edges")},
        "update_flops_over_useful": ratios["update"],
        "pflop": round(spent / 1e15, 6),
        "roof_share": roof_share(job, spent, took),
        "roof_share_of_useful": roof_share(job, useful_flops(counts, unit), took),
        "rollout_roof_share": roof_share(job, sampled, stages["rollout"]),
        "update_roof_share": roof_share(job, learned, stages["update"]),
        "roof_share_aim": AIM,
        "reward": round(counts["reward"], 5),
        "ok": all(math.isfinite(value) for value in counts.values()),
    }


def of_all_blocks(report: StepReport, took: float, ratio: float) -> Row:
    """How long a step of the whole network takes whose forwards are `ratio` times as dear; 1: as measured."""
    dearer = sum(report.seconds[stage] for stage in ("signals", "rollout", "update"))
    return {"step_seconds_all_blocks": round(took + (ratio - 1) * dearer, 2)}


def roof_share(job: Job, flops: float, seconds: float) -> float | None:
    """Useful FLOPs as a share of the roof; None on a CPU."""
    return None if job.dry or seconds <= 0 else round(flops / seconds / ROOF, 4)


def in_gib(peaks: Mapping[str, float]) -> Row:
    """Peaks by stage; none on a CPU."""
    return {f"{stage}_peak_gib": round(peak, 2) for stage, peak in peaks.items()}


def of_memory(engine: Engine, experiment: Experiment, peaks: Mapping[str, float]) -> Row:
    """What a step says about memory, beside what `aegpo check` estimates of it without scorers."""
    model = engine.policy.model
    assert isinstance(model, PipelineModel), "the subjects are pipelines"
    estimate = model.spec.footprint(experiment)  # of what was chosen for this machine
    assert estimate is not None, "pipelines have estimates"
    scorers = [scorer.reward for scorer in engine.rewards if isinstance(scorer.reward, LearnedReward)]
    sizes = [weight.numel() * weight.element_size() for each in scorers for weight in each.network.parameters()]
    beside, update = sum(sizes) / GiB, peaks.get("update")
    of_update = None if update is None else round((update - beside) / (estimate.total / GiB), 3)
    return {
        "scorers_gib": round(beside, 2),
        "estimate_gib": round(estimate.total / GiB, 2),
        "estimated_activations_gib": round(estimate.activations / GiB, 2),
        "update_peak_without_scorers_over_estimate": of_update,
    }
