"""What scoring during the rollouts saves: a training step with a slow reward on a server, asked early or at the end."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from aegpo.core.experiment import Experiment
from aegpo.rewards.remote import RemoteReward
from aegpo.train.engine import Engine
from aegpo.train.sampling import Sampling

SLOW = Path(__file__).resolve().with_name("slow_palette.py")
MICRO_BATCH, REQUEST = 16, 8  # latents through the network at a time, images in a request
LOADS = (0.5, 1.0, 2.0)  # seconds of scoring, in seconds of sampling
WORST = 0.95  # of what asking at the end takes, where a part of the waiting is hidden
STAGES = ("rollout", "reward")


def rewards_table(arms: Mapping[str, Experiment], steps: int) -> tuple[list[tuple[str, float, float]], list[str]]:
    """Times steps that ask early and late in turns, for each arm and load; figures and lines of the section."""
    figures: list[tuple[str, float, float]] = []
    rows = [
        "| arm | scoring / sampling | sampling, then waiting, s: asked at the end | asked early | ratio | at best |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for arm, experiment in arms.items():
        pause = _rollout_seconds(experiment) / experiment.rollouts.rollouts_per_step
        for load in LOADS:
            late, early = _measured(experiment, load * pause, steps)
            ratio, best = sum(early) / sum(late), max(late) / sum(late)
            figures.append((f"sampling and scoring, asked early / at the end: `{arm}`, load {load:g}", ratio, WORST))
            cells = [f"{sampling:.2f} + {waiting:.2f}" for sampling, waiting in (late, early)]
            rows.append(f"| {arm} | {load:g} | {' | '.join(cells)} | {ratio:.2f} | {best:.2f} |")
    return figures, [
        "A real `aegpo serve-reward` on loopback, whose reward pauses for every image (tools/slow_palette.py); one "
        f"request of {REQUEST} images at a time, `rollouts.micro_batch` {MICRO_BATCH}. Stages `rollout` and `reward` "
        f"of a training step, medians of {steps} in turns by one engine. At best the shorter one is hidden whole. "
        "The pause is set from one step before; on a busy machine the seconds say what the load really was.",
        "",
        *rows,
    ]


def _sized(experiment: Experiment, reward: RemoteReward | None) -> Experiment:
    rollouts = experiment.rollouts.model_copy(update={"micro_batch": MICRO_BATCH})
    changes: dict[str, object] = {"rollouts": rollouts} | ({} if reward is None else {"rewards": (reward,)})
    return experiment.model_copy(update=changes)


def _rollout_seconds(experiment: Experiment) -> float:
    """Of one step, after another to warm up."""
    engine = Engine.build(_sized(experiment, None))
    return [engine.step(number).seconds["rollout"] for number in (1, 2)][-1]


def _measured(experiment: Experiment, pause: float, steps: int) -> list[tuple[float, float]]:
    """Median seconds of sampling and of waiting for scores, asked at the end and asked early."""
    with _served(pause) as url:
        reward = RemoteReward(url=url, micro_batch=REQUEST, concurrency=1)
        engine = Engine.build(_sized(experiment, reward))
        (scorer,) = engine.rewards
        ways = ([replace(scorer, early=0)], [scorer])
        engine.step(1)
        found: tuple[list[list[float]], ...] = ([], [])
        for number in range(2, steps + 2):
            for way, scorers in enumerate(ways):
                engine.sampling = Sampling(engine.policy, scorers)
                seconds = engine.step(number).seconds
                found[way].append([seconds[stage] for stage in STAGES])
    medians = [np.median(way, axis=0) for way in found]
    return [(float(sampling), float(waiting)) for sampling, waiting in medians]


@contextmanager
def _served(pause: float) -> Iterator[str]:
    """The address of a server."""
    words = ["serve-reward", "slow-palette", "--set", f"seconds={pause:.6f}", "--port", "0", "--plugin", str(SLOW)]
    process = subprocess.Popen([sys.executable, "-m", "aegpo", *words], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process.stdout.readline().split(" at ")[1].strip()
    finally:
        process.terminate()
        process.wait()
