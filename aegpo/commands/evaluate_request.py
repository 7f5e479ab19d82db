"""What `aegpo evaluate` is asked: a run or a model, its rewards, refused before a model is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from aegpo.commands.sample import BASE, POLICY
from aegpo.config.given_rewards import parse_rewards
from aegpo.config.loading import load_experiment_file
from aegpo.core.experiment import Experiment
from aegpo.core.media import why_unread
from aegpo.core.parts import RewardSpec
from aegpo.core.registries import Registries
from aegpo.core.registry import Spec
from aegpo.errors import AegpoError
from aegpo.runs.opening import FoundRun, common_experiment, find_arm


@dataclass(frozen=True)
class EvaluateRequest:
    """What the command line asked for."""

    subject: Path  # a run's folder, an arm's with all its seeds, or an experiment file
    rewards: tuple[str, ...] = ()  # a kind or a mapping each; none: those of the experiment
    prompts: str | None = None  # a file or "hpsv2"; None: the experiment's held-out ones
    images_per_prompt: int | None = None  # None: as evaluation
    by: str | None = None  # key of the prompts' metadata whose values are styles; None: those of `prompts`
    checkpoint: int | None = None  # None: the newest
    seed: int | None = None  # None: of the experiment's evaluations
    steps: int | None = None  # denoising steps; None: as evaluation
    out: Path | None = None
    plugins: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()  # of an experiment file
    parts: tuple[type[Spec], ...] = ()  # classes that are registered beside those of plugins

    def images(self, experiment: Experiment) -> int:
        """Images of each prompt."""
        return self.images_per_prompt or experiment.evaluation.images_per_prompt


@dataclass(frozen=True)
class Subject:
    """What is evaluated: an experiment's model, and the policies that runs made of it."""

    experiment: Experiment
    runs: tuple[FoundRun, ...]  # of one arm under several seeds; none: the model alone

    @property
    def label(self) -> str:
        """How the page and folders call it."""
        if not self.runs:
            return f"{self.experiment.name}, model {self.experiment.model.kind}"
        seeds = ", ".join(str(run.seed) for run in self.runs)
        steps = ", ".join(map(str, dict.fromkeys(run.step for run in self.runs)))
        return f"{self.experiment.name}, {self.runs[0].arm} seed {seeds}, step {steps}"

    @property
    def columns(self) -> tuple[str, ...]:
        """Who paints, in the order of the runs after the base."""
        if len(self.runs) > 1:
            return (BASE, *(f"{POLICY}-seed-{run.seed}" for run in self.runs))
        return (BASE, POLICY) if self.runs else (BASE,)


def find_subject(request: EvaluateRequest, registries: Registries) -> Subject:
    """The runs of a folder, or the model of a file.

    Raises:
        AegpoError: if there is neither, or options are given that do not fit it.
    """
    if request.subject.is_file():
        if request.checkpoint is not None:
            raise AegpoError(f"--checkpoint is for runs, but {request.subject} is a file; leave it out, or give a run")
        file = load_experiment_file(request.subject, registries, request.overrides)
        models = {arm: each.model.model_dump(mode="json") for arm, each in file.arms.items()}
        first, *others = file.arms
        different = [arm for arm in others if models[arm] != models[first]]
        if different:
            raise AegpoError(
                f"{request.subject} has no one model: that of arm {different[0]!r} differs from that of {first!r}; "
                "give a file with one of them"
            )
        return Subject(file.arms[first], ())
    if request.overrides:
        raise AegpoError(
            f"--set changes an experiment file, but {request.subject} is none; a run is evaluated as it was trained"
        )
    runs = find_arm(request.subject, registries, request.checkpoint)
    for run in runs if request.prompts is None else ():
        run.check_prompts()
    return Subject(common_experiment(runs), tuple(runs))


def reward_specs(request: EvaluateRequest, subject: Subject, registries: Registries) -> tuple[RewardSpec, ...]:
    """The rewards asked for, or those of the experiment.

    Raises:
        AegpoError: for mistakes in them, or one that has nothing to compare.
    """
    experiment = subject.experiment
    own = (*experiment.rewards, *experiment.evaluation.rewards)
    specs = parse_rewards(request.rewards, registries) if request.rewards else own
    unread = [wrong for spec in specs if (wrong := why_unread(spec, experiment.model)) is not None]
    if unread:
        raise AegpoError(unread[0])
    for spec in specs:
        if spec.group_wise and spec.compared_with == "base" and not subject.runs:
            raise AegpoError(
                f"reward {spec.label!r} compares a policy's image with the base's, but {request.subject} is a model "
                "alone; give a run, or leave the reward out"
            )
        if spec.group_wise and spec.compared_with == "own" and request.images(experiment) < 2:
            raise AegpoError(
                f"reward {spec.label!r} compares the images of a prompt with one another, but one of each is painted; "
                "give --images-per-prompt 2 or more, or leave the reward out"
            )
    return specs
