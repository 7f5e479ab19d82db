"""A checkpoint of several processes: sharded tensors are copied, and written while the run goes on.

    copied -> each process writes its parts -> all have -> the first one puts the checkpoint in place
              ............... the run goes on ............

What is killed before the end leaves a hidden folder that the next checkpoint removes.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from aegpo.parallel.team import Team
from aegpo.runs import sharded_files
from aegpo.runs.checkpoints import Checkpoint, finish, made_hidden, on_disk, save, write_tensors
from aegpo.runs.sharded_files import SHARDS, Writing


class Saving:
    """A checkpoint that every process of a run is writing its part of."""

    def __init__(self, folder: Path, checkpoint: Checkpoint, keep: int, team: Team, writing: Writing) -> None:
        """What `begin` has begun; of `checkpoint` only what is no tensor matters any more."""
        self._folder, self._keep, self._team, self._writing = folder, keep, team, writing
        self._checkpoint = checkpoint

    @property
    def step(self) -> int:
        """The training step of the checkpoint."""
        return self._checkpoint.step

    def written(self) -> bool:
        """True for all processes, which all ask, when all have written."""
        return all(self._team.told(f"whether the state after step {self.step} is written", self._writing.done()))

    def finish(self) -> Path:
        """Puts the checkpoint in place, when all have written; all processes call this.

        Raises:
            CheckpointError: if it cannot be written, as on a full disk; the checkpoints that were there stay.
        """
        team, path = self._team, self._folder / f"step-{self.step:06d}"
        with team.agreed(f"the state after step {self.step} is written"), on_disk(self._folder, self.step):
            own = self._writing.sums()
        sums = {name: value for each in team.told("what each has written", own) for name, value in each.items()}
        with team.agreed(f"the state after step {self.step} is put in place"), on_disk(self._folder, self.step):
            if team.first:
                finish(self._folder, self._checkpoint, self._keep, sums)
        return path


def begin(folder: Path, checkpoint: Checkpoint, keep: int, team: Team) -> Saving | None:
    """Writes a checkpoint as `checkpoints.save` does, or begins to, if there are sharded tensors in it.

    Args:
        folder: what `checkpoints.save` gets, the same for all processes, which all call this.
        checkpoint: of each process, with its parts of sharded tensors; of the rest that of the first is written.
        keep: how many checkpoints stay.
        team: the processes.

    Returns:
        What is being written, while nothing else may be; None if it is on disk.

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
    writing = sharded_files.write(hidden / SHARDS, parts, team.aside())
    return Saving(folder, replace(checkpoint, tensors={}), keep, team, writing)
