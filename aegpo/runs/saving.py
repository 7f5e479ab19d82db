"""A checkpoint of several processes: sharded tensors are copied, and written while the run goes on.

    copied -> each process writes its parts -> all have -> the first puts the checkpoint in place -> it is told
              ............................. the run goes on .............................

What is killed before the end leaves a hidden folder that the next checkpoint removes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from aegpo.parallel.team import Team
from aegpo.runs.checkpoints import Checkpoint, finish, made_hidden, on_disk, save, write_tensors
from aegpo.runs.sharded_files import SHARDS, Writing, write


class Saving:
    """A checkpoint that every process of a run is writing its part of."""

    def __init__(self, folder: Path, step: int, team: Team, writing: Writing) -> None:
        """What `begin` has begun."""
        self._folder, self.step, self._team, self._writing = folder, step, team, writing

    def in_place(self) -> bool:
        """True for all processes, which all ask, when `finish` returns at once."""
        return all(self._team.told(f"whether the state after step {self.step} is written", self._writing.done()))

    def finish(self) -> None:
        """Returns when the checkpoint is in place; all processes call this.

        Raises:
            CheckpointError: if it cannot be written, as on a full disk; the checkpoints that were there stay.
        """
        with self._team.agreed(f"the state after step {self.step} is put in place"), on_disk(self._folder, self.step):
            self._writing.wait()


def begin(folder: Path, checkpoint: Checkpoint, keep: int, team: Team) -> Saving | None:
    """Writes a checkpoint as `checkpoints.save` does, or begins to, if there are sharded tensors in it.

    Args:
        folder: what `checkpoints.save` gets, the same for all processes, which all call this.
        checkpoint: of each process, with its parts of sharded tensors; of the rest that of the first is written.
        keep: how many checkpoints stay.
        team: the processes.

    Returns:
        What is being written, while no other checkpoint may be; None if it is on disk.

    Raises:
        CheckpointError: if it cannot be written; the checkpoints that were there stay.
    """
    from aegpo.parallel.dtensors import sharded

    parts = sharded(checkpoint.tensors)
    if not parts:
        if team.first:
            save(folder, checkpoint, keep)
        return None
    rest = {name: tensor for name, tensor in checkpoint.tensors.items() if name not in parts}
    hidden = folder / f".step-{checkpoint.step:06d}.tmp"
    with team.agreed(f"the state after step {checkpoint.step} is begun"), on_disk(folder, checkpoint.step):
        if team.first:
            write_tensors(made_hidden(folder, checkpoint.step), replace(checkpoint, tensors=rest))
    what = replace(checkpoint, tensors={})

    def put_in_place(sums: Mapping[str, str]) -> None:
        if team.first:
            finish(folder, what, keep, sums)

    return Saving(folder, checkpoint.step, team, write(hidden / SHARDS, parts, team.aside(), put_in_place))
