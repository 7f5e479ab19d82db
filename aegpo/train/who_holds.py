"""Who holds the weights of a run: every process all of them, or each its part."""

from __future__ import annotations

from dataclasses import replace

from aegpo.core.experiment import Experiment
from aegpo.core.phases import Weights, chosen_weights, parts_of, room_as_if_whole
from aegpo.parallel.team import Team


def who_holds(experiment: Experiment, team: Team, free: int) -> tuple[Weights, int]:
    """Whether weights are whole or sharded, the same in all processes, and the room that `ModelSpec.settled` is told.

    Args:
        experiment: whose model may say what it needs.
        team: the processes, which all ask.
        free: bytes that this one may use.
    """
    parallel = experiment.parallel
    if team.size == 1 or parallel.weights == "whole" or experiment.precision == "float16":
        return "whole", free
    footprint = experiment.model.footprint(experiment)
    if footprint is not None:
        footprint = replace(footprint, retained=experiment.retained_bytes)
    weights = chosen_weights(parallel, footprint, team.size, min(team.told("free memory", free)))
    if weights == "whole":
        return weights, free
    return weights, room_as_if_whole(footprint, parts_of(team.size, parallel.replicas), free)
