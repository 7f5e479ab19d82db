"""What options of `model` save on full-size random SD 3.5: compiled blocks, weights that wait, sizes of batches."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping

import torch

from aegpo.train.batch_sizes import Trial
from aegpo.train.engine import Engine
from gpu_sections.networks import random_weights, sd3
from gpu_sections.sections import Job, Row
from gpu_sections.steps import SUBJECTS, GiB, Subject, now, opened, peaks_by_stage

SHORT = {"rollouts.denoising_steps": 5}  # these rows are compared with each other alone
FREE = {"optimizer.retain": "never"}  # else what is free is filled
GRPO = Subject("sd35_aegpo", "grpo", sd3)


def compiled(job: Job) -> Iterator[Row]:
    """The same steps eager and with `compile: true`, the first of which compiles."""
    with random_weights(job.device, job.dry):
        eager: list[float] = []
        for compile in (False, True):
            engine = _engine(job, GRPO, {**SHORT, "model.compile": compile})
            seconds, rewards = [], []
            for number in range(1, 3 if job.dry else 4):
                begin = now(job.device)
                rewards.append(engine.step(number).metrics["reward"])
                seconds.append(now(job.device) - begin)
            eager = eager or rewards
            yield {
                "what": "compile: true" if compile else "eager",
                "experiment": f"{GRPO.file} {GRPO.arm}",
                "weights_millions": round(sum(each.numel() for each in engine.policy.model.policy.parameters()) / 1e6),
                "latents": "x".join(map(str, engine.policy.latent_shape)),
                "rollouts": engine.experiment.rollouts.rollouts_per_step,
                "denoising_steps": engine.experiment.rollouts.denoising_steps,
                "first_step_seconds": round(seconds[0], 2),
                "step_seconds": round(min(seconds[1:]), 3),
                "first_reward_off": round(rewards[0] - eager[0], 6),
            }
            del engine


def offload(job: Job) -> Iterator[Row]:
    """Full fine-tuning with the base and the scorer on the GPU, then with the one, then with both in main memory."""
    full: dict[str, object] = {"policy.train": "full", "policy.ema": "null", **SHORT, **FREE}
    subject = SUBJECTS["sd35"]
    with random_weights(job.device, job.dry):
        for base, scorer in ((False, False), (True, False), (True, True)):
            waits = {"model.offload_base": base, "rewards.0.offload": scorer}
            engine = _engine(job, subject, {**full, **waits})
            engine.step(1)
            with peaks_by_stage(job.device) as peaks:
                begin = now(job.device)
                report = engine.step(2)
                took = now(job.device) - begin
            experiment = engine.experiment
            estimate = experiment.model.footprint(experiment)
            yield {
                "what": f"offload_base: {str(base).lower()}, scorer's offload: {str(scorer).lower()}",
                "experiment": f"{subject.file} {subject.arm}, full fine-tuning",
                "latents": "x".join(map(str, engine.policy.latent_shape)),
                "rollouts": int(sum(report.counts)),
                "denoising_steps": experiment.rollouts.denoising_steps,
                "step_seconds": round(took, 3),
                **{f"{stage}_seconds": round(seconds, 3) for stage, seconds in report.seconds.items()},
                **{f"{stage}_peak_gib": round(peak, 2) for stage, peak in peaks.items()},
                "estimate_gib": None if estimate is None else round(estimate.total / GiB, 2),
            }
            del engine, report


def micro_batches(job: Job) -> Iterator[Row]:
    """States a second by how many there are at once, and what `micro_batch: auto` chooses of them."""
    auto = {"rollouts.micro_batch": "auto", "optimizer.micro_batch": "auto"}
    with random_weights(job.device, job.dry):
        begin = now(job.device)
        engine = _engine(job, SUBJECTS["sd35"], auto)
        built, experiment = now(job.device) - begin, engine.experiment
        trial = Trial.of(engine.policy, experiment, engine.asked(1)[0])
        for size in (1, 2, 4, 8, 16, 32):
            sampled, learned = trial.sampled(size), trial.learned(size)
            yield {
                "what": f"{size} at once",
                "sampled_a_second": None if sampled is None else round(sampled, 2),
                "learned_a_second": None if learned is None else round(learned, 2),
            }
        yield {
            "what": "auto",
            "build_seconds": round(built, 1),
            "graph_gib_a_state": round(trial.each / GiB, 3),
            "rollouts_micro_batch": experiment.rollouts.latents_at_once,
            "optimizer_micro_batch": experiment.optimizer.states_at_once,
        }


def _engine(job: Job, subject: Subject, changes: Mapping[str, object]) -> Engine:
    """An engine, once the memory of the one before it is free."""
    gc.collect()
    if job.device == "cuda":
        torch.cuda.empty_cache()
    return Engine.build(opened(job, subject, sd3(job.dry, 0.25 if job.dry else 1.0), changes))
