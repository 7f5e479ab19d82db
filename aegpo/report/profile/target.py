"""What is profiled: a run at one of its checkpoints, against its base; or the base of an experiment alone."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from aegpo.config.loading import load_experiment_file
from aegpo.core.experiment import Experiment
from aegpo.core.records import Prompt
from aegpo.core.registries import Registries
from aegpo.core.registry import suggestion
from aegpo.errors import AegpoError
from aegpo.method.signals.entropy_options import ENTROPY, ENTROPY_DELTA
from aegpo.prompts.lists import read_prompts, refuse_lacking
from aegpo.report.profile.other_signals import source_of
from aegpo.runs.opening import FoundRun, Options, find_run

if TYPE_CHECKING:
    from aegpo.train.engine import Engine

READS = frozenset((ENTROPY, ENTROPY_DELTA))  # what of a profile parts may read


@dataclass(frozen=True)
class ProfileRequest:
    """What the command line asked for."""

    path: Path  # of an experiment file, or a folder
    prompts: Path | None = None  # None: the experiment's held-out prompts
    arm: str | None = None
    seed: int | None = None
    checkpoint: int | None = None  # None: the newest
    layers: Sequence[str] = ("*",)
    rows: int | Literal["all"] = "all"
    out: Path | None = None
    validate: bool = False
    signals: Sequence[str] = ()  # that are validated beside entropy
    overrides: tuple[str, ...] = ()
    plugins: tuple[str, ...] = ()


@dataclass(frozen=True)
class Target:
    """The policy to profile."""

    experiment: Experiment
    arm: str
    seed: int
    prompts: tuple[Prompt, ...] = ()  # P, to profile
    folder: Path | None = None  # of the run; None: the base alone
    step: int = 0  # of the checkpoint; 0: the base
    steps: tuple[int, ...] = ()  # of all its checkpoints
    run: FoundRun | None = None  # None: the base alone

    @property
    def texts(self) -> tuple[str, ...]:
        """What the prompts say."""
        return tuple(prompt.text for prompt in self.prompts)

    @property
    def label(self) -> str:
        """How the profile calls it."""
        name = f"{self.experiment.name}, arm {self.arm}"
        return name if self.folder is None else f"{name}, seed {self.seed}, step {self.step}"

    def load(self, step: int, engine: Engine) -> None:
        """Gives the engine the state of one of the run's checkpoints.

        Raises:
            CheckpointError: if it is damaged or of another run, or the model has another base by now.
        """
        assert self.run is not None, "asked of a run only"
        checkpoint = self.run.load(step, engine.policy.device)
        engine.load_state_dict(checkpoint.tensors, checkpoint.state)

    @property
    def default_out(self) -> Path:
        """Where the profile goes if nobody says."""
        name = f"{self.experiment.name}-{self.arm}"
        return Path("profiles") / (name if self.folder is None else f"{name}-seed-{self.seed}-step-{self.step:06d}")


def find_target(request: ProfileRequest, registries: Registries) -> Target:
    """What a request means.

    Raises:
        AegpoError: for a folder that is no run's, an arm, seed or checkpoint that does not exist, or an option that
            makes no sense here; the message says what there is.
    """
    target = _of_run(request, registries) if request.path.is_dir() else _of_file(request, registries)
    experiment = target.experiment
    if request.prompts is not None:
        own = {"file": None, "evaluation": request.prompts, "evaluation_count": sys.maxsize}
        wanted = experiment.prompts.model_copy(update=own)
        experiment = experiment.model_copy(update={"prompts": wanted})
    prompts = read_prompts(experiment, "evaluation")
    for name in request.signals:
        if not request.validate:
            raise AegpoError(f"--signal {name} is validated beside entropy; it needs --validate")
        if source_of(experiment, name).provides[name] == "prompt" and target.folder is None:
            raise AegpoError(
                f"--signal {name} has values by prompt, which are compared with what prompts bring in a run; give the "
                "folder of one"
            )
    if request.validate:
        refuse_lacking(experiment.rewards, prompts, "evaluation")
    return replace(target, prompts=prompts)


def _of_file(request: ProfileRequest, registries: Registries) -> Target:
    if request.checkpoint is not None:
        raise AegpoError(
            f"--checkpoint {request.checkpoint}: {request.path} is no folder of a run, so it has no checkpoints; give "
            "OUT/NAME/ARM/seed-S instead"
        )
    file = load_experiment_file(request.path, registries, request.overrides)
    arm = request.arm or max(file.arms, key=lambda name: _readers(file.arms[name]))
    if arm not in file.arms:
        raise AegpoError(f"{request.path} has no arm {arm!r}; {suggestion(arm, file.arms)}")
    seed = file.seeds[0] if request.seed is None else request.seed
    return Target(file.experiment(arm, seed), arm, seed)


def _readers(experiment: Experiment) -> int:
    """How many parts read entropy."""
    return sum(bool(READS & set(names)) for names in experiment.reads.values())


def _of_run(request: ProfileRequest, registries: Registries) -> Target:
    if request.overrides:
        raise AegpoError("--set changes an experiment file; the experiment of a run is in its manifest, as it was run")
    options = Options(() if request.arm is None else (request.arm,), () if request.seed is None else (request.seed,))
    run = find_run(request.path, registries, request.checkpoint, options)
    if request.prompts is None:
        run.check_prompts()
    return Target(run.experiment, run.arm, run.seed, (), run.folder, run.step, run.steps, run)
