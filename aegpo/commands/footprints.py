"""What arms need in memory, and what there is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from aegpo.config.loading import ExperimentFile
from aegpo.core.footprint import Footprint
from aegpo.core.moments import FLOAT32
from aegpo.core.phases import Phases, Weights, chosen_weights, phases, whole_weights_from
from aegpo.core.processes import Place
from aegpo.parallel.team import Team


def footprints(file: ExperimentFile) -> dict[str, Footprint]:
    """By arm, of those whose model says what it needs; arms that train the same network alike share the estimate."""
    known: dict[str, Footprint | None] = {}
    found: dict[str, Footprint] = {}
    for arm, experiment in file.arms.items():
        parts = (experiment.model, experiment.policy, experiment.optimizer)
        key = "".join(part.model_dump_json() for part in parts)
        key += f"{experiment.largest_batch} {experiment.retained_bytes}"
        if key not in known:
            known[key] = experiment.model.footprint(experiment)
        footprint = known[key]
        if footprint is not None:
            found[arm] = replace(footprint, retained=experiment.retained_bytes)
    return found


@dataclass(frozen=True)
class Holding:
    """What each GPU of a run on several holds, and who has the weights."""

    whole: Phases
    sharded: Phases
    asked: str  # 'parallel.weights'
    weights: Weights | None  # what a run would choose; None: not known without a GPU
    whole_from: int  # bytes of a GPU from which on `auto` leaves all weights on each


def holdings(file: ExperimentFile, gpus: int, needs: Mapping[str, Footprint], room: int | None) -> dict[str, Holding]:
    """By arm, of those whose model says what of it can be shared; `room` is bytes of a GPU, if that is known."""
    found = {}
    for arm, needed in needs.items():
        parallel = file.arms[arm].parallel
        sums = gradient_sums(needed.trainable, gpus, parallel.shards or gpus)
        whole = phases(needed, gpus, "whole", room=room, sums=sums)
        sharded = phases(needed, gpus, "sharded", replicas=parallel.replicas, gather=parallel.gather, room=room)
        if whole is None or sharded is None:
            continue
        known = room is not None or gpus == 1 or parallel.weights != "auto"
        weights = chosen_weights(parallel, needed, gpus, room or 0) if known else None
        found[arm] = Holding(whole, sharded, parallel.weights, weights, whole_weights_from(needed, gpus))
    return found


def gradient_sums(trainable: int, processes: int, shards: int) -> int:
    """Bytes that adding up gradients takes on each process, beside the one gradient that is in every footprint.

    A process that adds up k shards by halves keeps the sums of log2(k) halves before the last. To add it to others' it
    lays it out flat, and the sum takes its place; summed by a tree, what comes from another is there too.
    """
    team = Team(Place(size=processes), None, shards)
    most = max(len(team.of(rank)) for rank in range(processes))
    between = 0 if processes == 1 else 2 if team.by_tree(trainable) else 1
    return max((most - 1).bit_length(), between) * trainable * FLOAT32


def gpu_memory() -> int | None:
    """Bytes of the first GPU; None without one."""
    import torch

    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
