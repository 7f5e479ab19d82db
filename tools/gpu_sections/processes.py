"""A GPU beside a CPU, several processes on one GPU, and NCCL."""

from __future__ import annotations

import multiprocessing
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection

import torch
from deterministic import deterministic

from aegpo.core.experiment import Experiment
from aegpo.core.processes import Place
from aegpo.core.reports import StepReport
from aegpo.parallel.link import Link
from aegpo.parallel.team import Team
from aegpo.train.engine import Engine
from gpu_sections.learning import ABLATION, TINY
from gpu_sections.sections import Job, Row, Value, told
from gpu_sections.steps import ROOT, loaded

STEPS, THREADS = 10, 4
FLIPPED = 2  # images of a step whose score rounding may turn over
CHAOS = 4  # how much further than two CPU runs a GPU's may be from a CPU's
OTHER = {"rollouts.micro_batch": 48, "optimizer.micro_batch": 48}  # rounds otherwise
SAID = re.compile(r"(\d+) processes: (\d+) values, (\d+) differ")

Told = list[tuple[float, tuple[int, ...]]]  # reward and counts, by step


# --- the same steps on both ------------------------------------------------------------------------------------------


def ablation(job: Job) -> Iterator[Row]:
    """Arm aegpo on the device, beside the CPU in two roundings: noise is keyed, so rounding alone differs.

    What rounding alone does to a run is what two runs of the CPU with other micro-batches are apart; over these ten
    steps those were equal to six digits (measured with the sizes of the file). Rewards count whole objects, so a score
    may turn over: two images of a step are allowed, and four times what the CPU's runs are apart so far.
    """
    steps, small = (2 if job.dry else STEPS), (TINY if job.dry else {})
    context, pipes = multiprocessing.get_context("fork"), []
    threads = 1 if job.dry else THREADS
    for rounding in ({}, OTHER):  # before CUDA is touched, which a forked process cannot use after its parent has
        ours, theirs = context.Pipe()
        asked = {"device": "cpu", **small, **rounding}
        context.Process(target=_numbers, args=(asked, steps, threads, theirs), daemon=True).start()
        theirs.close()
        pipes.append(ours)
    found = _steps({"device": job.device, **small}, steps)
    one, other = (_received(pipe) for pipe in pipes)
    images = sum(found[0][1])
    apart = 0.0
    for number, each in enumerate(zip(found, one, other, strict=True), 1):
        apart = max(apart, abs(each[2][0] - each[1][0]))
        yield {"what": f"step {number}", **_compared(images, each, apart)}


def _compared(images: int, each: Sequence[tuple[float, tuple[int, ...]]], apart: float) -> Row:
    (here, counts), (cpu, cpu_counts), (_, rounded_counts) = each
    most = FLIPPED / images + CHAOS * apart
    return {
        "arm": "ablation aegpo",
        "rollouts": images,
        "reward": round(here, 6),
        "cpu_reward": round(cpu, 6),
        "off": round(abs(here - cpu), 6),
        "cpu_runs_apart": round(apart, 6),
        "at_most": round(most, 6),
        "same_counts": counts == cpu_counts,
        "cpu_runs_same_counts": rounded_counts == cpu_counts,
        "ok": abs(here - cpu) <= most,
    }


def _numbers(changes: Mapping[str, object], steps: int, threads: int, pipe: Connection) -> None:
    torch.set_num_threads(threads)
    try:
        pipe.send(_steps(changes, steps))
    except Exception as error:
        pipe.send(told(error))


def _steps(changes: Mapping[str, object], steps: int) -> Told:
    engine = Engine.build(loaded(ABLATION, "aegpo", changes))
    reports = [engine.step(number) for number in range(1, 1 + steps)]
    return [(report.metrics["reward"], tuple(int(count) for count in report.counts)) for report in reports]


def _received(pipe: Connection) -> Told:
    answer: Told | str = pipe.recv()
    if isinstance(answer, str):
        raise RuntimeError(f"the run on the CPU failed: {answer}")
    return answer


# --- several processes -----------------------------------------------------------------------------------------------


def bits(job: Job) -> Iterator[Row]:
    """tools/same_bits.py over 1, 2 and 4 processes that share the GPU, with deterministic kernels."""
    sizes = {"training_steps": 2, "prompts.evaluation_count": 8, "device": job.device}
    if job.dry:
        small = {**TINY, "rollouts.rollouts_per_step": 24, "training_steps": 1, "prompts.evaluation_count": 2}
        sizes |= {**small, "evaluation.images": 2, "evaluation.denoising_steps": 2}
    numbers, arms = ((2,) if job.dry else (2, 4)), ("aegpo",)
    words = [sys.executable, str(ROOT / "tools" / "same_bits.py"), str(ROOT / "experiments" / "smoke.yaml")]
    words += [word for number in numbers for word in ("--processes", str(number))]
    words += [word for arm in arms for word in ("--arm", arm)]
    words += [word for name, value in sizes.items() for word in ("--set", f"{name}={value}")]
    words += ["--plugin", str(ROOT / "tools" / "deterministic.py")]
    place = {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))}
    done = subprocess.run(words, env={**os.environ, **place}, cwd=job.folder, capture_output=True, text=True)
    lines = [SAID.match(line) for line in done.stdout.splitlines()]
    found = [[int(number) for number in line.groups()] for line in lines if line is not None]
    for processes, values, differ in found:
        row: dict[str, Value] = {
            "what": f"{processes} processes",
            "arms": " ".join(arms),
            "values": values,
            "differ": differ,
        }
        yield {**row, "ok": values > 0 and differ == 0}
    if len(found) < len(numbers):
        raise RuntimeError(f"same_bits.py ended with {done.returncode}: {(done.stdout + done.stderr)[-1500:]}")


def nccl(job: Job) -> Iterator[Row]:
    """A step of arm aegpo through the link of one process, whose tensors go by NCCL, beside the same without a link."""
    changes = {"device": job.device, **(TINY if job.dry else {}), "training_steps": 1}
    experiment = loaded(ROOT / "experiments" / "smoke.yaml", "aegpo", changes)
    deterministic()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place, device = Place(address="127.0.0.1", port=port), torch.device(job.device)
    link = Link(place)
    link.use(timedelta(minutes=2), device)
    tensor = torch.arange(1 << (10 if job.dry else 24), dtype=torch.float32, device=device)
    same = bool(link.gathered(tensor, [len(tensor)]).equal(tensor) and link.summed(tensor.clone()).equal(tensor))
    backend = "gloo" if job.dry else "nccl"
    yield {"what": "gather and sum", "processes": 1, "backend": backend, "numbers": len(tensor), "ok": same}
    linked, alone = (_first_step(experiment, team) for team in (Team(place, link, 2), Team.alone(2)))
    differ = [name for name in alone.metrics if alone.metrics[name] != linked.metrics[name]]
    link.leave()
    found: dict[str, Value] = {
        "what": "a step",
        "processes": 1,
        "backend": backend,
        "shards": 2,
        "metrics": len(alone.metrics),
    }
    yield {**found, "differ": " ".join(differ) or "none", "ok": not differ}


def _first_step(experiment: Experiment, team: Team) -> StepReport:
    return Engine.build(experiment, team).step(1)
