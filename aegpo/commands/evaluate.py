"""`aegpo evaluate`: rewards and prompts of one's choice, for a run's policy beside its base, or for a model alone.

Every prompt is painted with the deterministic sampler, by the base and the policy from the same noise, and what is
painted is scored before it is written as JPEG. Images lie as `hpsv2.evaluate` expects them, so that the package can
score any of the folders too:

    base/STYLE/00000.jpg, ...         an image for each prompt of the style
    policy/STYLE/00000.jpg, ...       with several seeds policy-seed-0, policy-seed-1, ...
    base-2, policy-2, ...             a second image of each prompt, from another noise

A video is written as a strip of some of its frames.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from aegpo.commands.sample import BASE, POLICY
from aegpo.config.given_rewards import parse_rewards
from aegpo.config.loading import load_experiment_file
from aegpo.core.as_json import dumps
from aegpo.core.experiment import Experiment
from aegpo.core.files import whole_folder, write_atomically, write_json
from aegpo.core.media import why_unread
from aegpo.core.parts import RewardSpec
from aegpo.core.records import FloatArray, Prompt
from aegpo.core.registries import Registries
from aegpo.errors import AegpoError
from aegpo.plugin.manager import load_registries, plugin_manager
from aegpo.prompts.files import read_places
from aegpo.prompts.lists import lacking, numbered, quoted, read_prompts
from aegpo.report.evaluated import Evaluated, StyleScores, compare, page
from aegpo.rewards.hpsv2_prompts import benchmark_prompts
from aegpo.rewards.servers import asked
from aegpo.runs.opening import FoundRun, common_experiment, find_arm
from aegpo.runs.software import source_state, versions

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from aegpo.report.picture_sheet import Picture, Row
    from aegpo.train.execution import Execution
    from aegpo.train.policy import Policy
    from aegpo.train.scoring import Scorer

HPSV2 = "hpsv2"  # of --prompts: the benchmark
HELD_OUT = "held-out"  # the style of an experiment's own evaluation prompts
QUALITY = 95  # of JPEGs
SHOWN = 12  # prompts on the page's sheet


@dataclass(frozen=True)
class EvaluateRequest:
    """What the command line asked for."""

    subject: Path  # a run's folder, an arm's with all its seeds, or an experiment file
    rewards: tuple[str, ...] = ()  # a kind or a mapping each; none: those of the experiment
    prompts: str | None = None  # a file or "hpsv2"; None: the experiment's held-out ones
    images_per_prompt: int = 1
    checkpoint: int | None = None  # None: the newest
    seed: int | None = None  # None: of the experiment's evaluations
    steps: int | None = None  # denoising steps; None: as evaluation
    out: Path | None = None
    plugins: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()  # of an experiment file


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


def evaluate(request: EvaluateRequest) -> tuple[Path, Evaluated]:
    """Paints, scores, and writes the images, `scores.jsonl`, `summary.json` and `index.html`.

    Returns:
        The folder, which is whole or absent, and what was found.

    Raises:
        AegpoError: for a mistake in the request, before a model is loaded; or if a model or reward fails.
    """
    registries = load_registries(plugin_manager(request.plugins))
    subject = find_subject(request, registries)
    seed = subject.experiment.evaluation.seed if request.seed is None else request.seed
    request = replace(request, seed=seed)
    specs = reward_specs(request, subject, registries)
    prompts = styled_prompts(request.prompts, subject.experiment, specs)
    if subject.runs and not request.rewards:
        for line in asked(specs):
            print(f"{line}, as the run's manifest says", file=sys.stderr)
    out = request.out or Path("evaluations") / subject.label.replace(", ", "-").replace(" ", "-")

    from aegpo.train.policy import Policy
    from aegpo.train.scoring import build_scorers

    with whole_folder(out) as folder:
        policy = Policy(subject.experiment)
        scorers = build_scorers(specs, policy.device)
        painting = _Painting(policy, subject, scorers, request, folder, len(prompts))
        styles = [painting.style(name, each) for name, each in prompts.items()]
        found = compare(
            subject.label, styles, [spec.label for spec in specs], _settings(request, subject, specs, painting.steps)
        )
        write_json(folder / "summary.json", _summary(found, request, subject, specs, painting.steps))
        write_atomically(folder / "scores.jsonl", "".join(_score_rows(styles)).encode())
        write_atomically(folder / "index.html", page(found, painting.sheet()).encode())
    return out, found


# --- the request -----------------------------------------------------------------------------------------------------


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
    comparing = [spec.label for spec in specs if spec.group_wise]
    if comparing and not subject.runs:
        raise AegpoError(
            f"reward {comparing[0]!r} compares a policy's image with the base's, but {request.subject} is a model "
            "alone; give a run, or leave the reward out"
        )
    return specs


def styled_prompts(source: str | None, experiment: Experiment, specs: Sequence[RewardSpec]) -> dict[str, list[Prompt]]:
    """Prompts by style: the benchmark's four, or one that is named after a file.

    Raises:
        AegpoError: if they cannot be read, or lack what a reward needs.
    """
    if source is None:
        placed = {HELD_OUT: quoted(read_prompts(experiment, "evaluation"))}
    elif source == HPSV2:
        styles = benchmark_prompts()
        every = iter(quoted(numbered(chain.from_iterable(styles.values()))))  # so that no two have the same noise
        placed = {style: list(islice(every, len(texts))) for style, texts in styles.items()}
    else:
        places = read_places(Path(source))
        placed = {Path(source).stem: list(zip(places, numbered(places.values()), strict=True))}
    for prompts in placed.values():
        for message in lacking(specs, prompts):
            raise AegpoError(message)
    return {style: [prompt for _, prompt in prompts] for style, prompts in placed.items()}


# --- painting and scoring --------------------------------------------------------------------------------------------


class _Painting:
    """Paints styles, writes the images and keeps their scores."""

    def __init__(
        self,
        policy: Policy,
        subject: Subject,
        scorers: Sequence[Scorer],
        request: EvaluateRequest,
        folder: Path,
        styles: int,
    ) -> None:
        self._policy, self._scorers, self._folder = policy, scorers, folder
        self._seed, self._images = request.seed, request.images_per_prompt
        self._how: Execution = policy.painting(request.steps)
        self._columns, self._runs = subject.columns, subject.runs
        self._weights = [run.weights() for run in subject.runs]  # on the CPU
        self._rows: list[Row] = []
        self._shown = max(1, SHOWN // styles)  # of a style on the sheet

    @property
    def steps(self) -> int:
        """Denoising steps that are taken."""
        return len(self._how.sigmas) - 1

    def style(self, name: str, prompts: Sequence[Prompt]) -> StyleScores:
        """Paints and scores the prompts of a style."""
        from rich.console import Console
        from rich.progress import track

        texts = tuple(prompt.text for prompt in prompts)
        self._policy.prepare(prompts)
        size, labels = self._how.micro_batch, [scorer.label for scorer in self._scorers]
        shape = (max(1, len(self._runs)), self._images, len(texts))
        base, policy = ({label: np.zeros(shape) for label in labels} for _ in range(2))
        batches = [(image, first) for image in range(self._images) for first in range(0, len(texts), size)]
        for image, first in track(batches, description=name, console=Console(file=sys.stderr), transient=True):
            part = prompts[first : first + size]
            noise = self._policy.evaluation_noise(part, self._seed, image)
            for seed, (scores, base_scores) in enumerate(self._batch(name, image, first, part, noise)):
                for table, found in ((policy, scores), (base, base_scores)):
                    for label, values in found.items():
                        table[label][seed, image, first : first + size] = values
        return StyleScores(name, texts, base, policy if self._runs else None)

    def _batch(
        self, style: str, image: int, first: int, prompts: Sequence[Prompt], noise: Tensor
    ) -> Iterator[tuple[dict[str, FloatArray], dict[str, FloatArray]]]:
        """Scores of the policy and the base for each run; where there is none, nothing and those of the model."""
        from aegpo.report.picture_sheet import pictures
        from aegpo.train.held_out import HeldOut

        texts = [prompt.text for prompt in prompts]
        with self._policy.base():
            images = self._policy.images(prompts, noise, self._how)
        base = HeldOut(self._scorers, prompts, lambda _: images)
        shown = [self._save(pictures(images), self._columns[0], style, image, first)]
        if not self._runs:
            yield {}, dict(base.base_scores)
        for run, weights, column in zip(self._runs, self._weights, self._columns[1:], strict=True):
            self._policy.weights.take(weights, run.where)
            scores, base_scores, images = base.evaluate(lambda _: self._policy.images(prompts, noise, self._how))
            shown.append(self._save(pictures(images), column, style, image, first))
            yield scores, base_scores
        self._keep(texts, shown, image, first)

    def _save(self, images: list[Picture], column: str, style: str, image: int, first: int) -> list[Picture]:
        from aegpo.report.picture_sheet import strip

        folder = self._folder / (column if image == 0 else f"{column}-{image + 1}") / style
        folder.mkdir(parents=True, exist_ok=True)
        for number, each in enumerate(images, start=first):
            strip(each).save(folder / f"{number:05d}.jpg", quality=QUALITY, subsampling=0)
        return images

    def _keep(self, texts: Sequence[str], shown: Sequence[Sequence[Picture]], image: int, first: int) -> None:
        """The first prompts of every style are on the sheet."""
        from aegpo.report.picture_sheet import Row

        room = self._shown - first
        if image == 0 and room > 0:
            self._rows += [Row(*each) for each in zip(texts, zip(*shown, strict=True), strict=True)][:room]

    def sheet(self) -> Image:
        """Labelled pictures of some prompts, for the page."""
        from aegpo.report.picture_sheet import sheet

        return sheet(self._rows, self._columns)


# --- what is written -------------------------------------------------------------------------------------------------


def _settings(request: EvaluateRequest, subject: Subject, specs: Sequence[RewardSpec], steps: int) -> dict[str, str]:
    """What the page says was done."""
    evaluated = "; ".join(f"{run.folder}, step {run.step}" for run in subject.runs) or str(request.subject)
    each = "one image" if request.images_per_prompt == 1 else f"{request.images_per_prompt} images, scores averaged"
    return {
        "evaluated": evaluated,
        "prompts": request.prompts or "the experiment's held-out prompts",
        "images": f"{each} for each prompt, deterministic sampler, {steps} steps, start noise of seed {request.seed}",
        "rewards": "; ".join(
            json.dumps({"kind": spec.kind} | spec.model_dump(mode="json", exclude_defaults=True)) for spec in specs
        ),
    }


def _summary(
    found: Evaluated, request: EvaluateRequest, subject: Subject, specs: Sequence[RewardSpec], steps: int
) -> dict[str, Any]:
    return {
        "evaluated": subject.label,
        "runs": [{"folder": str(run.folder), "seed": run.seed, "step": run.step} for run in subject.runs],
        "model": subject.experiment.model.model_dump(mode="json"),
        "rewards": [spec.model_dump(mode="json") for spec in specs],
        "prompts": request.prompts,
        "images_per_prompt": request.images_per_prompt,
        "seed": request.seed,
        "denoising_steps": steps,
        "scores": [asdict(line) for line in found.lines],
        "versions": versions(),
        **source_state(),
    }


def _score_rows(styles: Sequence[StyleScores]) -> Iterator[str]:
    """A line of JSON a prompt: scores of the base, and of the policy under each seed, one number an image."""
    for style in styles:
        for index, text in enumerate(style.prompts):
            row: dict[str, Any] = {"style": style.style, "prompt": text, "base": _of(style.base, index)}
            if style.policy is not None:
                row["policy"] = _of(style.policy, index)
            yield dumps(row) + "\n"


def _of(scores: Mapping[str, FloatArray], prompt: int) -> dict[str, Any]:  # (S, N) of each reward
    return {label: values[:, :, prompt].tolist() for label, values in scores.items()}
