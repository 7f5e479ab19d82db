"""Where a step's prompts come from: a list, shuffled anew every epoch, as a pure function of (seed, step)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from aegpo.errors import AegpoError
from aegpo.interfaces import IntArray, Prompt
from aegpo.specs import Experiment

_SHUFFLE = 7919  # keeps the stream of shuffles apart from the stream of decisions


def read_prompts(experiment: Experiment, split: Literal["train", "evaluation"]) -> tuple[str, ...]:
    """The prompts of a split: the lines of its file, or the model's own captions.

    Raises:
        AegpoError: if a file is missing or has no prompts.
    """
    spec = experiment.prompts
    path, count = (spec.train, spec.train_count) if split == "train" else (spec.evaluation, spec.evaluation_count)
    if path is not None:
        return _lines(path)[:count]
    return experiment.model.captions(split, count, spec.seed)


def refuse_shared(train: Sequence[str], held_out: Sequence[str]) -> None:
    """Held-out prompts must not occur in training.

    Raises:
        AegpoError: if any does; the message names one.
    """
    known = set(train)
    shared = [text for text in held_out if text in known]
    if shared:
        raise AegpoError(
            f"prompts: {len(shared)} of {len(held_out)} evaluation prompts are trained on too, such as {shared[0]!r}; "
            "scores on them would not be held-out, so give 'prompts.evaluation' a file of its own"
        )


def _lines(path: Path) -> tuple[str, ...]:
    try:
        lines = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    except OSError as error:
        raise AegpoError(f"prompts: cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise AegpoError(f"prompts: {path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    if not lines:
        raise AegpoError(f"prompts: {path} has no prompts; it should have one a line")
    return lines


class PromptStream:
    """Training prompts in epochs; `at(step)` needs no memory, so a resumed run goes on where it was."""

    def __init__(self, texts: Sequence[str], per_step: int, seed: int) -> None:
        if len(texts) < per_step:
            raise AegpoError(f"prompts: {len(texts)} training prompts are fewer than the {per_step} of a step")
        self._texts, self._per_step, self._seed = tuple(texts), per_step, seed
        self._last: tuple[int, IntArray] | None = None  # the epoch asked for last, and its order

    def at(self, step: int) -> tuple[Prompt, ...]:  # P
        """The prompts of a training step, counted from 1; every prompt once before any comes again."""
        first = (step - 1) * self._per_step
        return tuple(self._nth(position) for position in range(first, first + self._per_step))

    def _nth(self, position: int) -> Prompt:
        epoch, place = divmod(position, len(self._texts))
        if self._last is None or self._last[0] != epoch:
            rng = np.random.default_rng((_SHUFFLE, self._seed, epoch))
            self._last = epoch, rng.permutation(len(self._texts))
        index = int(self._last[1][place])
        return Prompt(index, self._texts[index])
