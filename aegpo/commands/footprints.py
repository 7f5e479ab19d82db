"""What arms need in memory, and what there is."""

from __future__ import annotations

from dataclasses import replace

from aegpo.config.loading import ExperimentFile
from aegpo.core.footprint import Footprint
from aegpo.core.moments import FLOAT32
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
