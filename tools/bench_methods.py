"""Iteration time of every method of experiments/baselines.yaml, as a ratio to plain GRPO, in one run."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

from aegpo.config.loading import load_experiment_file
from aegpo.core.experiment import Experiment
from aegpo.method.costs import Cost, cost
from aegpo.plugin.manager import load_registries, plugin_manager
from aegpo.train.engine import Engine

ROOT = Path(__file__).resolve().parent.parent
METHODS = ROOT / "experiments" / "baselines.yaml"
ABLATION = ROOT / "experiments" / "ablation.yaml"
REFERENCE = "grpo"  # of the ablation, at the size of the methods


@dataclass
class Timed:
    """One method: its engine, what a step should cost, and what steps took."""

    engine: Engine
    planned: Cost
    wall: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)

    @property
    def work(self) -> float:
        """Forwards and their like in a step, the middle of the range, with the probe."""
        return (self.planned.work.low + self.planned.work.high) / 2 + self.planned.signals

    def step(self) -> None:
        """One more training step, timed unless it is the first, which warms up."""
        number = len(self.wall) + 1
        wall, processor = time.perf_counter(), time.process_time()
        self.engine.step(number)
        self.wall.append(time.perf_counter() - wall)
        self.processor.append(time.process_time() - processor)


def experiments(methods: Path = METHODS) -> dict[str, Experiment]:
    """Every arm of the methods, after GRPO as in the ablation with as many prompts, rollouts and steps as they have."""
    registries = load_registries(plugin_manager())
    arms = load_experiment_file(methods, registries).arms
    grpo = load_experiment_file(ABLATION, registries).arms[REFERENCE]
    like = next(experiment for experiment in arms.values() if experiment.rollouts.rollouts_per_step == 48)
    sized = {"rollouts": like.rollouts, "optimizer": like.optimizer, "prompts": like.prompts}
    return {REFERENCE: grpo.model_copy(update=sized), **arms}


def methods_table(steps: int) -> list[str]:
    """Times `steps` training steps of every method in turns, after one to warm up, and returns the section's lines."""
    timed = {arm: Timed(Engine.build(each), cost(each)) for arm, each in experiments().items()}
    for _ in range(steps + 1):
        for each in timed.values():
            each.step()
    grpo = timed[REFERENCE]
    rows = [
        "| method | rollouts | planned work, to grpo | processor time of a step, s | to grpo | wall-clock, s |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for arm, each in timed.items():
        best, wall = min(each.processor[1:]), min(each.wall[1:])
        ratio = best / min(grpo.processor[1:])
        rows.append(
            f"| {arm} | {each.planned.leaves} | {each.work / grpo.work:.2f} | {best:.2f} | {ratio:.2f} | {wall:.2f} |"
        )
    return [
        f"Best of {steps} training steps each, in turns, after one to warm up. `grpo` is the ablation's with as many "
        "prompts, rollouts and denoising steps as `baselines.yaml` starts from; the others are its arms. Planned work "
        "is forwards + 3 x gradient rows, the middle of its range, with the probe; a ratio should be near it.",
        "",
        *rows,
    ]
