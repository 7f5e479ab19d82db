"""What arms need in memory, and what there is."""

from __future__ import annotations

from aegpo.config.loading import ExperimentFile
from aegpo.core.records import Footprint


def footprints(file: ExperimentFile) -> dict[str, Footprint]:
    """By arm, of those whose model says what it needs; arms that train the same network alike share the estimate."""
    known: dict[str, Footprint | None] = {}
    found: dict[str, Footprint] = {}
    for arm, experiment in file.arms.items():
        parts = (experiment.model, experiment.policy, experiment.optimizer)
        key = "".join(part.model_dump_json() for part in parts)
        if key not in known:
            known[key] = experiment.model.footprint(experiment)
        footprint = known[key]
        if footprint is not None:
            found[arm] = footprint
    return found


def gpu_memory() -> int | None:
    """Bytes of the first GPU; None without one."""
    import torch

    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
