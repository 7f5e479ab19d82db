"""Opens what was run: the experiment of a run folder, and its policy at a checkpoint beside the base.

Every command takes the same folders: OUT/NAME/ARM/seed-S, which is a run; OUT/NAME/ARM, an arm with its seeds; and
OUT/NAME. Where one run is meant and the folder has several, the error lists them.

Commands that look at a policy (`sample`, `export`, `evaluate`) need neither its optimizer nor its rewards, so nothing
of them is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aegpo.config.loading import parse_experiment
from aegpo.config.older import modern
from aegpo.core.experiment import Experiment
from aegpo.core.experiment_type import experiment_type
from aegpo.core.registries import Registries
from aegpo.errors import AegpoError, CheckpointError, SpecError
from aegpo.runs import checkpoints
from aegpo.runs.bases import Base, check_base, pinned
from aegpo.runs.batches import SECTIONS, with_noted
from aegpo.runs.folders import Run
from aegpo.runs.manifest import identity, read_manifest
from aegpo.runs.painting_only import without_missing
from aegpo.runs.places import read_places
from aegpo.runs.rules import without_words
from aegpo.runs.split import check_split

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from aegpo.runs.checkpoints import Checkpoint

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Options:
    """What `--arm` and `--seed` of a command name among the runs of a folder."""

    arms: tuple[str, ...] = ()  # empty: every one
    seeds: tuple[int, ...] = ()


@dataclass(frozen=True)
class FoundRun:
    """A run on disk, and the checkpoint of it that is meant."""

    folder: Path
    arm: str
    seed: int
    experiment: Experiment
    step: int
    steps: tuple[int, ...]  # of all its checkpoints
    base: Base | None = None  # that it was trained from; what 0.1 began does not say
    missing: tuple[str, ...] = ()  # parts of its method that are not installed, where only its policy is asked for

    @property
    def label(self) -> str:
        """How messages and pages call it."""
        return f"{self.experiment.name}, {self.arm} seed {self.seed}, step {self.step}"

    @property
    def where(self) -> str:
        """How messages call its checkpoint."""
        return f"the checkpoint of step {self.step} in {self.folder}"

    @property
    def checkpoints(self) -> Path:
        """The folder `aegpo.runs.checkpoints` reads."""
        return self.folder / "checkpoints"

    def weights(self) -> dict[str, Tensor]:
        """The trained weights by name, on the CPU: the averaged ones where the run keeps them, as evaluation does.

        Raises:
            CheckpointError: if the checkpoint is damaged or of another run, or the model has another base by now.
        """
        loaded = self.load(self.step, prefixes=("policy", "ema"))
        averaged = any(name.startswith("ema/") for name in loaded.tensors)
        prefix = "ema/" if averaged else "policy/"
        return {name.removeprefix(prefix): value for name, value in loaded.tensors.items() if name.startswith(prefix)}

    def check_prompts(self) -> None:
        """Its held-out prompts are those that it was begun with.

        Raises:
            CheckpointError: if their file is split in another way now.
        """
        check_split(self.folder, read_manifest(self.folder), self.experiment)

    def load(self, step: int, device: torch.device | str = "cpu", prefixes: Sequence[str] | None = None) -> Checkpoint:
        """A checkpoint of the run, for the model of its experiment, which is loaded.

        Raises:
            CheckpointError: if it is damaged or of another run, or the model has another base by now.
        """
        check_base(self.folder, self.base, self.experiment.model)
        whose = identity(read_manifest(self.folder))
        return checkpoints.load_step(self.checkpoints, step, device, prefixes, run=whose)


def find_run(
    path: Path,
    registries: Registries,
    checkpoint: int | None = None,
    options: Options | None = None,
    *,
    only_policy: bool = False,
) -> FoundRun:
    """The one run that a folder and the options name.

    Args:
        path: the folder of a run, or one with a single run below it.
        registries: the parts its experiment may have.
        checkpoint: the training step; None: the newest.
        options: of a command that has `--arm` and `--seed`; None: it has none.
        only_policy: the run is painted with or exported and no more, so that parts of its method may be missing.

    Raises:
        AegpoError: if the folder is no run's or has no such checkpoint; the message says what there is.
    """
    folders = _named(run_folders(path), path, options)
    if len(folders) > 1:
        choosing = "--arm and --seed" if len({folder.parent for folder in folders}) > 1 else "--seed"
        how = "" if options is None else f", or choose it with {choosing}"
        names = "\n".join(f"  {folder}" for folder in folders)
        raise AegpoError(f"{path} holds {len(folders)} runs; name one of them{how}:\n{names}")
    return read_run(folders[0], registries, checkpoint, only_policy=only_policy)


def find_arm(path: Path, registries: Registries, checkpoint: int | None = None) -> list[FoundRun]:
    """Every seed of the one arm in a folder, or the one run of a folder OUT/NAME/ARM/seed-S.

    Raises:
        AegpoError: as `find_run`, or if the runs below the folder are of several arms.
    """
    folders = run_folders(path)
    arms = sorted({folder.parent for folder in folders})
    if len(arms) > 1:
        names = "\n".join(f"  {arm}" for arm in arms)
        raise AegpoError(f"{path} holds {len(arms)} arms; name one of them:\n{names}")
    return [read_run(folder, registries, checkpoint) for folder in folders]


def begun_runs(path: Path, registries: Registries, options: Options) -> list[Run]:
    """The runs of a folder, to go on with as they were begun; seed by seed, so that all arms get on alike.

    Raises:
        AegpoError: as `find_run`, but for several runs, which are all meant.
    """
    runs = []
    for folder in _named(run_folders(path), path, options):
        manifest, experiment, _ = _read(folder, registries)
        runs.append(Run(manifest["arm"], manifest["seed"], experiment, folder))
    return sorted(runs, key=lambda run: run.seed)


def run_folders(path: Path) -> list[Path]:
    """The folder itself if it is a run's, else those of the runs below it.

    Raises:
        AegpoError: if there is none.
    """
    if (path / MANIFEST).is_file():
        return [path]
    found = [folder.parent for pattern in ("seed-*", "*/seed-*") for folder in path.glob(f"{pattern}/{MANIFEST}")]
    found = [folder for folder in found if folder.name.removeprefix("seed-").isdecimal()]
    if not found:
        what = f"there is no folder {path}" if not path.exists() else f"{path} is not the folder of a run"
        raise AegpoError(f"{what}: a run has a {MANIFEST}; give OUT/NAME/ARM/seed-S")
    return sorted(found, key=lambda folder: (folder.parent, int(folder.name.removeprefix("seed-"))))


def _named(folders: list[Path], path: Path, options: Options | None) -> list[Path]:
    """Those of the folders that the options name.

    Raises:
        AegpoError: if an option names none.
    """
    for name, wanted in () if options is None else (("arm", options.arms), ("seed", options.seeds)):
        if wanted:
            known = {folder: read_manifest(folder)[name] for folder in folders}
            for each in wanted:
                if each not in known.values():
                    there = ", ".join(str(value) for value in dict.fromkeys(known.values()))
                    raise AegpoError(f"--{name} {each}: {path} has no run of that {name}; those there are: {there}")
            folders = [folder for folder in folders if known[folder] in wanted]
    return folders


def read_run(folder: Path, registries: Registries, checkpoint: int | None, *, only_policy: bool = False) -> FoundRun:
    """One run at one of its checkpoints; `only_policy` as for `find_run`.

    Raises:
        AegpoError: if its manifest cannot be read, it has no such checkpoint, or its base is another one by now.
    """
    manifest, experiment, missing = _read(folder, registries, only_policy=only_policy)
    steps = checkpoints.steps_in(folder / "checkpoints")
    if not steps:
        raise CheckpointError(f"{folder} has no checkpoint yet; go on with the run until it has written one")
    if checkpoint is not None and checkpoint not in steps:
        there = ", ".join(map(str, steps))
        raise CheckpointError(f"{folder} has no checkpoint of step {checkpoint}; those there are: {there}")
    step = steps[-1] if checkpoint is None else checkpoint
    base = manifest.get("base")
    check_base(folder, base, experiment.model)
    return FoundRun(folder, manifest["arm"], manifest["seed"], experiment, step, steps, base, missing)


def _read(
    folder: Path, registries: Registries, *, only_policy: bool = False
) -> tuple[dict[str, Any], Experiment, tuple[str, ...]]:
    """The manifest of a run, its experiment, and what is missing of that; what an older one lacks has its default."""
    manifest = read_manifest(folder)
    data, missing = deepcopy(modern(manifest["experiment"])), tuple[str, ...]()
    if only_policy:
        data, missing = without_missing(data, registries)
    try:
        data = read_places(folder, manifest, experiment_type(registries), data)
        experiment = with_noted(parse_experiment(data, registries), manifest)
        return manifest, pinned(experiment, manifest.get("base")), missing
    except SpecError as error:
        begun = manifest["versions"].get("aegpo")
        raise AegpoError(
            f"{folder} was begun by aegpo {begun}, and its experiment is not one this version and its plugins can "
            f"read:\n{error}\nuse that version, or give the missing plugin with --plugin"
        ) from error


def common_experiment(runs: Sequence[FoundRun]) -> Experiment:
    """The experiment of runs that differ in their seed, in words about it, and in how much is done at once.

    Raises:
        AegpoError: if they differ in more.
    """
    left = {section: {"micro_batch"} for section in SECTIONS}
    dumps = (run.experiment.model_copy(update={"seed": 0}).model_dump(mode="json", exclude=left) for run in runs)
    plain = [*map(without_words, dumps)]
    for run, fields in zip(runs, plain, strict=True):
        if fields != plain[0]:
            differing = ", ".join(name for name in fields if fields[name] != plain[0].get(name))
            raise AegpoError(
                f"{run.folder} and {runs[0].folder} were run with different experiments (in {differing}); name one run"
            )
    return runs[0].experiment
