"""How far the gradients of different training steps agree before anything is learned: is there one direction to learn?

    python tools/gradient_agreement.py experiments/ablation.yaml --arm grpo --steps 6

Steps differ in prompts and noise, so a cosine near 0 says that what one batch teaches the next does not want, and that
a long run will hardly climb. Prints the mean over all pairs of steps with its standard error over steps (jackknife),
and the rewards of the rollouts. Nothing is written.
"""

from __future__ import annotations

import argparse
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aegpo.config.loading import load_experiment_file
from aegpo.core.experiment import Experiment
from aegpo.plugin.manager import load_registries, plugin_manager
from aegpo.train.engine import Engine
from aegpo.train.tally import Tally


def gradients(experiment: Experiment, steps: int) -> tuple[Tensor, list[float]]:
    """The whole gradient of each of so many steps of the base policy, (steps, weights), and their mean rewards."""
    engine, found = Engine.build(experiment), list[Tensor]()

    def measure(rollouts: Any, credit: Any, cond: Any, deals: Any, noise: Any) -> Tally:
        parts = engine.learner.gradients(rollouts, credit, cond, noise)
        found.append(torch.cat([part.flatten() for part in parts]).cpu())
        return Tally()

    engine.learner.update = measure  # type: ignore[method-assign]
    rewards = [float(engine.step(number).metrics["reward"]) for number in range(1, steps + 1)]
    return torch.stack(found), rewards


def agreement(vectors: Tensor) -> tuple[float, float]:
    """Mean cosine of all pairs, and its standard error by leaving out one step at a time."""
    unit = vectors / vectors.norm(dim=1, keepdim=True)
    cosines = (unit @ unit.T).numpy()

    def mean(kept: list[int]) -> float:
        return float(np.mean([cosines[pair] for pair in combinations(kept, 2)]))

    steps = len(vectors)
    without = [mean([row for row in range(steps) if row != left]) for left in range(steps)]
    return mean([*range(steps)]), float(np.sqrt((steps - 1) * np.var(without)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="an experiment file")
    parser.add_argument("--arm", help="default: the first")
    parser.add_argument("--steps", type=int, default=6, help="training steps that are compared, at least 3")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as of aegpo run")
    given = parser.parse_args()
    arms = load_experiment_file(given.file, load_registries(plugin_manager()), tuple(given.set)).arms
    arm = given.arm or next(iter(arms))
    vectors, rewards = gradients(arms[arm], given.steps)
    cosine, error = agreement(vectors)
    print(f"{arm}: mean cosine of the gradients of {given.steps} steps {cosine:.3f} (standard error {error:.3f})")
    print("mean reward of the rollouts, step by step: " + ", ".join(f"{reward:.3f}" for reward in rewards))


if __name__ == "__main__":
    main()
