"""One process of a team that runs arms of an experiment file a few steps, and says what came of it as checksums.

    python shard_worker.py FILE SHARDS ARM...

The first process prints JSON: of each arm, SHA-256 of weights, averages, moments, generators, metrics and evaluations.
"""

from __future__ import annotations

import hashlib
import json
import resource
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from aegpo.config.loading import load_experiment_file
from aegpo.core.experiment import Experiment
from aegpo.core.reports import Evaluation, StepReport
from aegpo.parallel.team import Team
from aegpo.plugin.manager import load_registries, plugin_manager
from aegpo.train.engine import Engine


def main(path: str, shards: str, *arms: str) -> None:
    torch.set_num_threads(1)
    team = Team.joined().cut(int(shards))
    file = load_experiment_file(Path(path), load_registries(plugin_manager()))
    team.use(5, torch.device("cpu"))
    found = {arm: outcome(file.experiment(arm, 0), team) for arm in arms}
    seconds = team.told("processor time", resource.getrusage(resource.RUSAGE_SELF).ru_utime)
    if team.first:
        print(json.dumps({"arms": found, "seconds": seconds}))
    team.leave()


def outcome(experiment: Experiment, team: Team) -> dict[str, str]:
    """What a short run of one arm ends with."""
    engine = Engine.build(experiment, team)
    begin = evaluated(engine.evaluator.evaluate())
    steps = [stepped(engine.step(number)) for number in range(1, experiment.training_steps + 1)]
    told = [begin, steps, evaluated(engine.evaluator.evaluate())]
    tensors, state = engine.state_dict()
    kinds: dict[str, Any] = {name: hashlib.sha256() for name in ("policy", "ema", "old", "optimizer", "rng", "part")}
    for name, tensor in sorted(tensors.items()):
        digest = kinds[name.split("/", 1)[0]]
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    sums = {name: digest.hexdigest() for name, digest in kinds.items()}
    return {**sums, "state": checksum(state), "told": checksum(told)}


def stepped(report: StepReport) -> Any:
    """A training step, but for how long it took."""
    signals = {name: signal.values.tolist() for name, signal in report.signals.items()}
    return [report.metrics, report.counts.tolist(), report.selected.tolist(), signals]


def evaluated(evaluation: Evaluation) -> Any:
    """An evaluation, but for how long it took."""
    known = asdict(evaluation)
    images = hashlib.sha256(known.pop("images").numpy().tobytes()).hexdigest()
    scores = {name: {label: each.tolist() for label, each in known[name].items()} for name in ("scores", "base_scores")}
    return [scores, images, list(evaluation.prompts)]


def checksum(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


if __name__ == "__main__":
    main(*sys.argv[1:])
