"""Opens what was run: the experiment of a run folder, and its policy at a checkpoint beside the base.

Commands that look at a policy (`sample`, `export`, `evaluate`) need neither its optimizer nor its rewards, so nothing
of them is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from aegpo.config.loading import parse_experiment
from aegpo.core.experiment import Experiment
from aegpo.core.parts import Registries
from aegpo.errors import AegpoError, CheckpointError, SpecError
from aegpo.runs import checkpoints
from aegpo.runs.manifest import read_manifest

if TYPE_CHECKING:
    from torch import Tensor

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class FoundRun:
    """A run on disk, and the checkpoint of it that is meant."""

    folder: Path
    arm: str
    seed: int
    experiment: Experiment
    step: int

    @property
    def label(self) -> str:
        """How messages and pages call it."""
        return f"{self.experiment.name}, {self.arm} seed {self.seed}, step {self.step}"

    @property
    def where(self) -> str:
        """How messages call its checkpoint."""
        return f"the checkpoint of step {self.step} in {self.folder}"

    def weights(self) -> dict[str, Tensor]:
        """The trained weights by name, on the CPU: the averaged ones where the run keeps them, as evaluation does.

        Raises:
            CheckpointError: if the checkpoint is damaged.
        """
        loaded = checkpoints.load_step(self.folder / "checkpoints", self.step, prefixes=("policy", "ema"))
        averaged = any(name.startswith("ema/") for name in loaded.tensors)
        prefix = "ema/" if averaged else "policy/"
        return {name.removeprefix(prefix): value for name, value in loaded.tensors.items() if name.startswith(prefix)}


def find_run(path: Path, registries: Registries, checkpoint: int | None = None) -> FoundRun:
    """The run of a folder OUT/NAME/ARM/seed-S, or the only run below one.

    Args:
        path: the folder.
        registries: the parts its experiment may have.
        checkpoint: the training step; None: the newest.

    Raises:
        AegpoError: if the folder is no run's or has no such checkpoint; the message says what there is.
    """
    runs = run_folders(path)
    if len(runs) > 1:
        names = "\n".join(f"  {run}" for run in runs)
        raise AegpoError(f"{path} holds {len(runs)} runs; name one of them:\n{names}")
    return read_run(runs[0], registries, checkpoint)


def find_arm(path: Path, registries: Registries, checkpoint: int | None = None) -> list[FoundRun]:
    """Every seed of the arm in a folder OUT/NAME/ARM, or the one run of a folder OUT/NAME/ARM/seed-S.

    Raises:
        AegpoError: as `find_run`, or if the runs below the folder are of several arms.
    """
    folders = run_folders(path)
    arms = sorted({folder.parent for folder in folders})
    if len(arms) > 1:
        names = "\n".join(f"  {arm}" for arm in arms)
        raise AegpoError(f"{path} holds {len(arms)} arms; name one of them:\n{names}")
    return [read_run(folder, registries, checkpoint) for folder in folders]


def run_folders(path: Path) -> list[Path]:
    """The folder itself if it is a run's, else those of the runs below it.

    Raises:
        AegpoError: if there is none.
    """
    if (path / MANIFEST).is_file():
        return [path]
    found = [folder.parent for pattern in ("seed-*", "*/seed-*") for folder in path.glob(f"{pattern}/{MANIFEST}")]
    if not found:
        what = f"there is no folder {path}" if not path.exists() else f"{path} is not the folder of a run"
        raise AegpoError(f"{what}: a run has a {MANIFEST}; give OUT/NAME/ARM/seed-S")
    return sorted(found, key=lambda folder: (folder.parent, int(folder.name.removeprefix("seed-"))))


def read_run(folder: Path, registries: Registries, checkpoint: int | None) -> FoundRun:
    """One run at one of its checkpoints.

    Raises:
        AegpoError: if its manifest cannot be read, or it has no such checkpoint.
    """
    manifest = read_manifest(folder)
    try:
        experiment = parse_experiment(manifest["experiment"], registries)
    except SpecError as error:
        begun = manifest["versions"].get("aegpo")
        raise AegpoError(
            f"{folder} was begun by aegpo {begun}, and its experiment is not one this version and its plugins can "
            f"read:\n{error}\nuse that version, or give the missing plugin with --plugin"
        ) from error
    steps = checkpoints.steps_in(folder / "checkpoints")
    if not steps:
        raise CheckpointError(f"{folder} has no checkpoint yet; go on with the run until it has written one")
    if checkpoint is not None and checkpoint not in steps:
        there = ", ".join(map(str, steps))
        raise CheckpointError(f"{folder} has no checkpoint of step {checkpoint}; those there are: {there}")
    step = steps[-1] if checkpoint is None else checkpoint
    return FoundRun(folder, manifest["arm"], manifest["seed"], experiment, step)


def common_experiment(runs: Sequence[FoundRun]) -> Experiment:
    """The experiment of runs that differ in their seed only.

    Raises:
        AegpoError: if they differ in more.
    """
    plain = [run.experiment.model_copy(update={"seed": 0}).model_dump(mode="json") for run in runs]
    for run, fields in zip(runs, plain, strict=True):
        if fields != plain[0]:
            differing = ", ".join(name for name in fields if fields[name] != plain[0].get(name))
            raise AegpoError(
                f"{run.folder} and {runs[0].folder} were run with different experiments (in {differing}); name one run"
            )
    return runs[0].experiment
