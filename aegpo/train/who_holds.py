"""Who holds the weights of a run: every process all of them, or each its part."""

from __future__ import annotations

from dataclasses import replace

from aegpo.core.experiment import Experiment
from aegpo.core.phases import Weights, chosen_weights, parts_of, share
from aegpo.parallel.team import Team


def who_holds(experiment: Experiment, team: Team, free: int) -> tuple[Weights, int]:
    """Whether weights are whole or sharded, the same in all processes, and the bytes that sharing saves each of them.

    Args:
        experiment: whose model may say what it needs.
        team: the processes, which all ask.
        free: bytes that this one may use.
    """
    parallel = experiment.parallel
    if team.size == 1 or parallel.weights == "whole":
        return "whole", 0
    footprint = experiment.model.footprint(experiment)
    if footprint is not None:
        footprint = replace(footprint, retained=experiment.retained_bytes)
    weights = chosen_weights(parallel, footprint, team.size, min(team.told("free memory", free)))
    if weights == "whole" or footprint is None:
        return weights, 0
    shared = share(footprint, parts_of(team.size, parallel.replicas))
    if shared is None or shared.whole_from is None or footprint.whole_from is None:
        return weights, 0
    return weights, max(0, footprint.whole_from - shared.whole_from)
