"""`aegpo check --rewards`: each reward on an image that should score high and on one that should not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aegpo.config.loading import ExperimentFile
from aegpo.core.examples import Exemplary
from aegpo.core.experiment import Experiment
from aegpo.core.parts import RewardSpec
from aegpo.core.records import Prompt
from aegpo.errors import AegpoError

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor

_SIDE, _GREY, _FRAMES = 256, 0.5, 3  # pixels, value and frames of a plain image, where nothing else is said


@dataclass(frozen=True)
class Tried:
    """What a reward scored."""

    label: str
    high: float  # mean over the images, in the reward's own unit; of a plain image where no pair is known
    low: float | None = None  # None: no pair is known

    @property
    def wrong(self) -> bool:
        """True if the image that should score low scores at least as high."""
        return self.low is not None and not self.high > self.low

    def __str__(self) -> str:
        if self.low is None:
            return f"{self.label}: a plain grey image scores {self.high:.4g}; no pair of images is known to try it with"
        order = "NOT above" if self.wrong else "above"
        right = f"{self.label}: {self.high:.4g} for an image that should score high"
        return f"{right}, {order} {self.low:.4g} for one that should not"


def try_rewards(file: ExperimentFile, console: Console) -> None:
    """Prints a line for each reward of a file's arms, trained on or not; their models are loaded.

    Raises:
        AegpoError: if a reward cannot be loaded, fails, or scores a pair in the wrong order; the lines are printed.
    """
    wrong = []
    for spec, experiment in _rewards(file):
        tried = _try(spec, experiment)
        console.print(str(tried), markup=False, highlight=False)
        wrong += [tried.label] if tried.wrong else []
    if wrong:
        raise AegpoError(
            f"{', '.join(wrong)}: the image that should score low scores at least as high, so training would go the "
            "wrong way; look at the reward's settings, its weights and what it returns"
        )


def _rewards(file: ExperimentFile) -> Iterator[tuple[RewardSpec, Experiment]]:
    """Each reward once, with the first arm that has it."""
    met = list[RewardSpec]()
    for experiment in file.arms.values():
        for spec in (*experiment.rewards, *experiment.evaluation.rewards):
            plain = spec.model_copy(update={"weight": 1.0})
            if plain not in met:
                met.append(plain)
                yield spec, experiment


def _try(spec: RewardSpec, experiment: Experiment) -> Tried:
    import torch

    from aegpo.train.devices import choose_device
    from aegpo.train.scoring import build_scorers, score

    device = choose_device(experiment.device)
    (scorer,) = build_scorers([spec], device)

    def scores_of(images: Tensor, prompt: Prompt) -> Tensor:  # (n,)
        return score([scorer], images.to(device), [prompt] * len(images))[spec.label]

    if not isinstance(spec, Exemplary):
        prompt = _prompt(spec, experiment)
        return Tried(spec.label, float(scores_of(_plain(spec, experiment), prompt).mean()))
    known = spec.examples()
    high, low = (torch.from_numpy(each).float() for each in (known.high, known.low))
    if spec.group_wise and spec.compared_with == "base":
        scores = scores_of(torch.cat([high, low]), known.prompt)
        return Tried(spec.label, float(scores[: len(high)].mean()), float(scores[len(high) :].mean()))
    return Tried(spec.label, float(scores_of(high, known.prompt).mean()), float(scores_of(low, known.prompt).mean()))


def _plain(spec: RewardSpec, experiment: Experiment) -> Tensor:  # (n, [F,] 3, h, w)
    """Grey images: two of a reward that compares those of a prompt."""
    import torch

    size = (experiment.evaluation.height or _SIDE, experiment.evaluation.width or _SIDE)
    frames = (_FRAMES,) if spec.media == "video" else ()
    return torch.full((2 if spec.group_wise else 1, *frames, 3, *size), _GREY)


def _prompt(spec: RewardSpec, experiment: Experiment) -> Prompt:
    """The first held-out prompt, which has what the reward needs.

    Raises:
        AegpoError: if it cannot be read.
    """
    from aegpo.prompts.lists import read_prompts, refuse_lacking

    prompt = read_prompts(experiment, "evaluation")[0]
    refuse_lacking([spec], [prompt], "evaluation")
    return prompt
