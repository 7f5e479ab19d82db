"""Checkpoints of whole weights, written again by two processes as those of sharded weights: the same numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from shutil import rmtree

from damage import Made, run_folder
from teams import failures_in_team
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from aegpo.parallel.dtensors import own_part
from aegpo.parallel.team import Team
from aegpo.runs.checkpoints import load_step, steps_in
from aegpo.runs.saving import begin

SIZE = 2


def spread_checkpoints(team: Team, folder: Path) -> None:
    """Writes every checkpoint of the run in `folder` again; each process calls this."""
    mesh = init_device_mesh("cpu", (SIZE,))
    for step in steps_in(folder / "checkpoints"):
        found = load_step(folder / "checkpoints", step)
        likes = {name: distribute_tensor(each, mesh, [Shard(0)]) for name, each in found.tensors.items() if each.dim()}
        likes = {name: like for name, like in likes.items() if name.startswith(("policy/", "ema/", "optimizer/"))}
        parts = {name: own_part(found.tensors[name], like) for name, like in likes.items()}
        saving = begin(folder / "again", replace(found, tensors=found.tensors | parts), 9, team)
        assert saving is not None
        saving.finish()


def spread(made: Made, out: Path) -> None:
    """Spreads the checkpoints of `aegpo` seed 0, which stopped, in a copy of the runs."""
    folder = run_folder(out)
    failures = failures_in_team(SIZE, [spread_checkpoints], folder)
    assert not failures, failures
    rmtree(folder / "checkpoints")
    (folder / "again").rename(folder / "checkpoints")
    for path in folder.glob("failed-*.json"):
        path.unlink()
    assert made.stopped != out
