"""One process of a team that runs arms of an experiment file a few steps and keeps what came of it, weights and all.

    python sharded_worker.py FILE PARALLEL FOLDER ARM...

PARALLEL is JSON, the section `parallel`. The first process writes FOLDER/ARM.safetensors with the tensors of the end,
those of the beginning, the scores of evaluations, and those of the end by an engine that has all weights.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

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
        found, state = outcome(experiment, team.cut(settings.shards or team.size))
        if team.first:
            again = Engine.build(experiment, Team.alone())
            again.evaluator.evaluate()  # the base comes first
            again.load_state_dict({name: found[name] for name in found if "/" in name and name[0] != "_"}, state)
            found["_scores/whole"] = scored(again.evaluator.evaluate())
            save_file(found, Path(folder, f"{arm}.safetensors"))
    team.leave()


def outcome(experiment: Experiment, team: Team) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What a short run of one arm begins and ends with, and what of its state is JSON."""
    engine = Engine.build(experiment, team)
    begin = {f"_begin/{name}": whole(tensor).clone() for name, tensor in engine.learner.state_dict().items()}
    scores = {"_scores/begin": scored(engine.evaluator.evaluate())}
    for number in range(1, experiment.training_steps + 1):
        engine.step(number)
    scores["_scores/end"] = scored(engine.evaluator.evaluate())
    tensors, state = engine.state_dict()
    return {**begin, **scores, **{name: whole(tensor).contiguous() for name, tensor in tensors.items()}}, state


def scored(evaluation: Evaluation) -> Tensor:
    """(rewards, prompts), of policy and base."""
    both = (*evaluation.scores.values(), *evaluation.base_scores.values())
    return torch.stack([torch.from_numpy(each) for each in both])


if __name__ == "__main__":
    main(*sys.argv[1:])
