"""Which prompts a step has: a list, shuffled anew every epoch, as a pure function of (seed, step)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np

from aegpo.core.experiment import Experiment
from aegpo.core.parts import RewardSpec
from aegpo.core.problems import Problem
from aegpo.core.records import IntArray, Prompt
from aegpo.core.sections import DatasetPrompts
from aegpo.errors import AegpoError, SettingError
from aegpo.prompts.sources import read_dataset, read_file, read_places

Split = Literal["train", "evaluation"]
_SHUFFLE = 7919  # keeps the stream of shuffles apart from the stream of decisions


def read_prompts(experiment: Experiment, split: Split) -> tuple[str, ...]:
    """The prompts of a split: of its file or dataset, or the model's own captions.

    Raises:
        AegpoError: if they cannot be read or there are none.
    """
    spec = experiment.prompts
    source, count = (spec.train, spec.train_count) if split == "train" else (spec.evaluation, spec.evaluation_count)
    if source is None:
        return experiment.model.captions(split, count, spec.seed)
    if split == "train" and spec.shared == "drop":
        held_out = set(read_prompts(experiment, "evaluation"))
        return tuple(text for text in _texts(source) if text not in held_out)[:count]
    return _texts(source)[:count]


def _texts(source: Path | DatasetPrompts) -> tuple[str, ...]:
    if isinstance(source, DatasetPrompts):
        return read_dataset(source)
    return tuple(prompt.text for prompt in read_file(source))


def problems(experiment: Experiment) -> Iterator[Problem]:
    """Files whose prompts the chosen rewards cannot score: found before a run, the first prompt of each file.

    Files are read only where a reward is particular about prompts; datasets are not read at load.
    """
    every = (*experiment.rewards, *experiment.evaluation.rewards)
    spec = experiment.prompts
    asked: list[tuple[Split, Path | DatasetPrompts | None, Sequence[RewardSpec]]]
    asked = [("train", spec.train, experiment.rewards), ("evaluation", spec.evaluation, every)]
    for split, path, rewards in asked:
        particular = [reward for reward in rewards if reward.particular]
        if not isinstance(path, Path) or not particular:
            continue
        try:
            used = _used(experiment, split, read_places(path))
        except AegpoError as error:
            yield Problem(("prompts", split), error.message)
            continue
        refused = ((each, where, why) for where, text in used for each in particular if (why := each.refuses(text)))
        for each, where, why in islice(refused, 1):
            yield Problem(("prompts", split), f"{where}: reward {each.label!r} cannot score this prompt: {why}")


def _used(experiment: Experiment, split: Split, places: Mapping[str, Prompt]) -> list[tuple[str, str]]:
    """Places and texts of the prompts of a file that a run takes, as `read_prompts` does."""
    spec = experiment.prompts
    texts = [(where, prompt.text) for where, prompt in places.items()]
    if split == "train" and spec.shared == "drop" and not isinstance(spec.evaluation, DatasetPrompts):
        held_out = set(read_prompts(experiment, "evaluation"))
        texts = [(where, text) for where, text in texts if text not in held_out]
    return texts[: spec.train_count if split == "train" else spec.evaluation_count]


def refuse_shared(train: Sequence[str], held_out: Sequence[str]) -> None:
    """Held-out prompts must not occur in training.

    Raises:
        AegpoError: if any does; the message names one.
    """
    known = set(train)
    shared = [text for text in held_out if text in known]
    if shared:
        raise SettingError(
            f"{len(shared)} of {len(held_out)} evaluation prompts are trained on too, such as {shared[0]!r}; "
            "scores on them would not be held-out, so give 'prompts.evaluation' a file of its own, or set "
            "'prompts.shared: drop' to leave them out of training",
            "prompts",
        )


class PromptStream:
    """Training prompts in epochs; `at(step)` needs no memory, so a resumed run goes on where it was."""

    def __init__(self, texts: Sequence[str], per_step: int, seed: int) -> None:
        if len(texts) < per_step:
            message = f"{len(texts)} training prompts are fewer than the {per_step} of a step"
            raise SettingError(message, "prompts")
        self._texts, self._per_step, self._seed = tuple(texts), per_step, seed
        self._last: tuple[int, IntArray] | None = None  # the epoch asked for last, and its order

    def at(self, step: int) -> tuple[Prompt, ...]:  # P
        """The prompts of a training step, counted from 1; every prompt once before any comes again."""
        first = (step - 1) * self._per_step
        return tuple(self._nth(position) for position in range(first, first + self._per_step))

    def until(self, last_step: int) -> tuple[str, ...]:
        """The texts that steps 1 to `last_step` have, each once: of a long list and a short run, a small part."""
        if last_step * self._per_step >= len(self._texts):
            return tuple(dict.fromkeys(self._texts))
        return tuple(dict.fromkeys(prompt.text for step in range(1, last_step + 1) for prompt in self.at(step)))

    def _nth(self, position: int) -> Prompt:
        epoch, place = divmod(position, len(self._texts))
        if self._last is None or self._last[0] != epoch:
            rng = np.random.default_rng((_SHUFFLE, self._seed, epoch))
            self._last = epoch, rng.permutation(len(self._texts))
        index = int(self._last[1][place])
        return Prompt(index, self._texts[index])
