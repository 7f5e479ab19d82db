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
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from aegpo.commands.evaluate_prompts import Styled, styled_prompts
from aegpo.commands.evaluate_request import EvaluateRequest, Subject, find_subject, reward_specs
from aegpo.core.as_json import dumps
from aegpo.core.files import whole_folder, write_atomically, write_json
from aegpo.core.parts import RewardSpec
from aegpo.core.processes import refuse_several_processes
from aegpo.core.records import FloatArray
from aegpo.core.terminals import plain
from aegpo.plugin.manager import load_registries, plugin_manager
from aegpo.report.evaluated import Evaluated, StyleScores, compare, page
from aegpo.rewards.servers import asked
from aegpo.runs.software import source_state, versions

if TYPE_CHECKING:
    from PIL.Image import Image

    from aegpo.report.picture_sheet import Picture, Row
    from aegpo.train.execution import Execution
    from aegpo.train.policy import Policy
    from aegpo.train.scoring import Scorer

QUALITY = 95  # of JPEGs
SHOWN = 12  # prompts on the page's sheet


def evaluate(request: EvaluateRequest) -> tuple[Path, Evaluated]:
    """Paints, scores, and writes the images, `scores.jsonl`, `summary.json` and `index.html`.

    Returns:
        The folder, which is whole or absent, and what was found.

    Raises:
        AegpoError: for a mistake in the request, before a model is loaded; or if a model or reward fails.
    """
    refuse_several_processes()
    registries = load_registries(plugin_manager(request.plugins, request.parts))
    subject = find_subject(request, registries)
    seed = subject.experiment.evaluation.seed if request.seed is None else request.seed
    request = replace(request, seed=seed)
    specs = reward_specs(request, subject, registries)
    prompts = styled_prompts(request, subject.experiment, specs)
    if subject.runs and not request.rewards:
        for line in asked(specs):
            print(f"{line}, as the run's manifest says", file=sys.stderr)
    out = request.out or Path("evaluations") / subject.label.replace(", ", "-").replace(" ", "-")

    from aegpo.train.policy import Policy
    from aegpo.train.scoring import build_scorers

    with whole_folder(out) as folder:
        policy = Policy(subject.experiment)
        scorers = build_scorers(specs, policy.device)
        painting = _Painting(policy, subject, scorers, request, folder, prompts)
        styles, labels = painting.styles(), [spec.label for spec in specs]
        settings = _settings(request, subject, specs, painting.steps)
        found = compare(subject.label, styles, labels, settings, request.by or "style")
        write_json(folder / "summary.json", _summary(found, request, subject, specs, painting.steps))
        write_atomically(folder / "scores.jsonl", "".join(_score_rows(styles)).encode())
        write_atomically(folder / "index.html", page(found, painting.sheet()).encode())
    return out, found


# --- painting and scoring --------------------------------------------------------------------------------------------


class _Painting:
    """Paints prompts, writes the images and keeps their scores."""

    def __init__(
        self,
        policy: Policy,
        subject: Subject,
        scorers: Sequence[Scorer],
        request: EvaluateRequest,
        folder: Path,
        prompts: Sequence[Styled],
    ) -> None:
        self._policy, self._scorers, self._folder, self._prompts = policy, scorers, folder, prompts
        self._seed, self._images = request.seed, request.images(subject.experiment)
        self._how: Execution = policy.painting(request.steps)
        self._columns, self._runs = subject.columns, subject.runs
        self._weights = [run.weights() for run in subject.runs]  # on the CPU
        styles = list(dict.fromkeys(each.style for each in prompts))
        self._shown = max(1, SHOWN // len(styles))  # of a style on the sheet
        self._rows: dict[str, list[Row]] = {style: [] for style in styles[:SHOWN]}

    @property
    def steps(self) -> int:
        """Denoising steps that are taken."""
        return len(self._how.sigmas) - 1

    def styles(self) -> list[StyleScores]:
        """Paints and scores the prompts in their order, all images of a prompt together; the scores of each style."""
        from rich.console import Console
        from rich.progress import track

        from aegpo.train.held_out import parts

        prompts = [each.prompt for each in self._prompts]
        self._policy.prepare(prompts)
        shape = (max(1, len(self._runs)), self._images, len(prompts))
        base, policy = ({scorer.label: np.zeros(shape) for scorer in self._scorers} for _ in range(2))
        every, first = list(parts(prompts, self._images, self._how.micro_batch)), 0
        errors = Console(file=sys.stderr)
        for part in track(every, "painting", console=errors, transient=True, disable=plain(errors)):
            place = slice(first, first + len(part))
            for seed, (scores, base_scores) in enumerate(self._part(self._prompts[place])):
                for table, found in ((policy, scores), (base, base_scores)):
                    for label, values in found.items():
                        table[label][seed, :, place] = values.reshape(len(part), self._images).T
            first += len(part)
        return _by_style(self._prompts, base, policy if self._runs else None)

    def _part(self, part: Sequence[Styled]) -> Iterator[tuple[dict[str, FloatArray], dict[str, FloatArray]]]:
        """Scores of each image, by the policy and the base for each run; without a run nothing and the model's."""
        from aegpo.report.picture_sheet import pictures
        from aegpo.train.held_out import HeldOut, repeated

        alone = [each.prompt for each in part]
        prompts, noise = repeated(alone, self._images), self._policy.evaluation_noise(alone, self._seed, self._images)
        with self._policy.base():
            images = self._policy.images(prompts, noise, self._how)
        base = HeldOut(self._scorers, prompts, lambda _: images)
        shown = [self._save(pictures(images), self._columns[0], part)]
        if not self._runs:
            yield {}, dict(base.base_scores)
        for run, weights, column in zip(self._runs, self._weights, self._columns[1:], strict=True):
            self._policy.weights.take(weights, run.where)
            scores, base_scores, images = base.evaluate(lambda _: self._policy.images(prompts, noise, self._how))
            shown.append(self._save(pictures(images), column, part))
            yield scores, base_scores
        self._keep(part, shown)

    def _save(self, images: list[Picture], column: str, part: Sequence[Styled]) -> list[Picture]:
        """Writes each prompt's images, which are neighbours; returns the first ones."""
        from aegpo.report.picture_sheet import strip

        for image in range(self._images):
            folder = self._folder / (column if image == 0 else f"{column}-{image + 1}")
            for each, picture in zip(part, images[image :: self._images], strict=True):
                (folder / each.style).mkdir(parents=True, exist_ok=True)
                file = folder / each.style / f"{each.number:05d}.jpg"
                strip(picture).save(file, quality=QUALITY, subsampling=0)
        return images[:: self._images]

    def _keep(self, part: Sequence[Styled], shown: Sequence[Sequence[Picture]]) -> None:
        """The first prompts of every style are on the sheet, of as many styles as it has room for."""
        from aegpo.report.picture_sheet import Row

        for each, pictures in zip(part, zip(*shown, strict=True), strict=True):
            if each.style in self._rows and each.number < self._shown:
                self._rows[each.style].append(Row(each.prompt.text, pictures))

    def sheet(self) -> Image:
        """Labelled pictures of some prompts, for the page."""
        from aegpo.report.picture_sheet import sheet

        return sheet([row for rows in self._rows.values() for row in rows], self._columns)


def _by_style(
    prompts: Sequence[Styled], base: Mapping[str, FloatArray], policy: Mapping[str, FloatArray] | None
) -> list[StyleScores]:
    """Scores (S, N, K) of all prompts as those of each style, in the order in which styles come first."""
    places: dict[str, list[int]] = {}
    for place, each in enumerate(prompts):
        places.setdefault(each.style, []).append(place)

    def of(scores: Mapping[str, FloatArray], found: list[int]) -> dict[str, FloatArray]:
        return {label: values.take(found, axis=2) for label, values in scores.items()}

    return [
        StyleScores(
            style,
            tuple(prompts[place].prompt.text for place in found),
            of(base, found),
            None if policy is None else of(policy, found),
        )
        for style, found in places.items()
    ]


# --- what is written -------------------------------------------------------------------------------------------------


def _settings(request: EvaluateRequest, subject: Subject, specs: Sequence[RewardSpec], steps: int) -> dict[str, str]:
    """What the page says was done."""
    evaluated = "; ".join(f"{run.folder}, step {run.step}" for run in subject.runs) or str(request.subject)
    images = request.images(subject.experiment)
    by = "" if request.by is None else f", by {request.by}"
    each = "one image" if images == 1 else f"{images} images, scores averaged"
    return {
        "evaluated": evaluated,
        "prompts": (request.prompts or "the experiment's held-out prompts") + by,
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
        "by": request.by,
        "images_per_prompt": request.images(subject.experiment),
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
