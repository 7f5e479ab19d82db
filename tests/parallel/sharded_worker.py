"""One process of a team that runs arms of an experiment file a few steps and keeps what came of it, weights and all.

    python sharded_worker.py FILE PARALLEL FOLDER ARM...

PARALLEL is JSON, the section `parallel`. The first process writes FOLDER/ARM.safetensors with the tensors of the end,
the weights of the beginning and the scores of evaluations.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from aegpo.config.loading import load_experiment_file
from aegpo.core.experiment import Experiment
from aegpo.core.reports import Evaluation
from aegpo.core.sections import ParallelSpec
from aegpo.parallel.dtensors import whole
from aegpo.parallel.team import Team
from aegpo.plugin.manager import load_registries, plugin_manager
from aegpo.train.engine import Engine


def main(path: str, parallel: str, folder: str, *arms: str) -> None:
    torch.set_num_threads(1)
    settings = ParallelSpec(**json.loads(parallel))
    team = Team.joined()
    file = load_experiment_file(Path(path), load_registries(plugin_manager()))
    team.use(2, torch.device("cpu"))
    for arm in arms:
        experiment = file.experiment(arm, 0).model_copy(update={"parallel": settings})
        found = outcome(experiment, team.cut(settings.shards or team.size))
        if team.first:
            save_file(found, Path(folder, f"{arm}.safetensors"))
    team.leave()


def outcome(experiment: Experiment, team: Team) -> dict[str, Tensor]:
    """What a short run of one arm begins and ends with."""
    engine = Engine.build(experiment, team)
    begin = {f"begin/{name}": whole(tensor).clone() for name, tensor in engine.learner.state_dict().items()}
    scores = {"scores/begin": scored(engine.evaluator.evaluate())}
    for number in range(1, experiment.training_steps + 1):
        engine.step(number)
    scores["scores/end"] = scored(engine.evaluator.evaluate())
    tensors, _ = engine.state_dict()
    print(team.place.rank, "done", file=sys.stderr)
    return {**begin, **scores, **{name: whole(tensor).contiguous() for name, tensor in tensors.items()}}


def scored(evaluation: Evaluation) -> Tensor:
    """(rewards, prompts), of policy and base."""
    both = (*evaluation.scores.values(), *evaluation.base_scores.values())
    return torch.stack([torch.from_numpy(each) for each in both])


if __name__ == "__main__":
    main(*sys.argv[1:])
