"""The lists of prompts: read, numbered, and refused where a run could not use them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from aegpo.core import contracts, promises
from aegpo.core.experiment import Experiment
from aegpo.core.parts import RewardSpec
from aegpo.core.records import Prompt
from aegpo.core.sections import DatasetPrompts, Split
from aegpo.errors import SettingError
from aegpo.prompts.datasets import Asked, read_dataset
from aegpo.prompts.entries import Listed
from aegpo.prompts.files import read_file
from aegpo.prompts.splitting import split_file


def read_prompts(experiment: Experiment, split: Split) -> tuple[Prompt, ...]:
    """The prompts of a split, by their index: of its file or dataset with their metadata, or the model's own captions.

    Raises:
        AegpoError: if they cannot be read or there are none.
    """
    return read_list(experiment, split).prompts


def read_list(experiment: Experiment, split: Split) -> Listed:
    """As `read_prompts`, with what of a dataset is not used; of files `problems` says so at load.

    Raises:
        AegpoError: as `read_prompts`.
    """
    spec = experiment.prompts
    source, count = spec.source(split), spec.train_count if split == "train" else spec.evaluation_count
    if spec.file is not None:
        train, held_out = split_file(experiment)
        return Listed(numbered([*(train if split == "train" else held_out).values()][:count]))
    if source is None:
        return Listed(captions(experiment, split, count))
    dropped = set[Asked]()
    if split == "train" and spec.shared == "drop":
        dropped = {prompt.asked for prompt in read_prompts(experiment, "evaluation")}
    if isinstance(source, DatasetPrompts):
        return read_dataset(source, dropped, count)
    return Listed(numbered([prompt for prompt in read_file(source) if prompt.asked not in dropped][:count]))


def captions(experiment: Experiment, split: Split, count: int) -> tuple[Prompt, ...]:
    """The model's own prompts.

    Raises:
        AegpoError: if the model has not so many, or fails.
    """
    model = experiment.model
    with contracts.blaming("model", model.kind):
        found = model.captions(split, count, experiment.prompts.seed)
        return numbered(promises.check_captions(model.kind, found, count))


def numbered(prompts: Iterable[str | Prompt]) -> tuple[Prompt, ...]:
    """Texts or prompts as a list of their own: the index of each is its place."""
    before: dict[tuple[str, tuple[Path, ...]], int] = {}  # how many asked the same so far
    listed: list[Prompt] = []
    for index, each in enumerate(prompts):
        asked = (each, ()) if isinstance(each, str) else each.asked
        nth = before.get(asked, 0)
        if isinstance(each, str):
            listed.append(Prompt(index, each, occurrence=nth))
        else:
            listed.append(replace(each, index=index, occurrence=nth))
        before[asked] = nth + 1
    return tuple(listed)


def lacking(rewards: Sequence[RewardSpec], places: Iterable[tuple[str, Prompt]]) -> Iterator[str]:
    """The prompts without metadata or an image that a reward needs, with their places; a null counts as absent."""
    for where, prompt in places:
        for reward in rewards:
            if reward.needs_images and not prompt.images:
                yield f"{where}: reward {reward.label!r} needs an image, but this prompt has none; name one as 'image'"
            if (lacks := missing(prompt, reward.needs_metadata)) is not None:
                yield f"{where}: reward {reward.label!r} needs {lacks}"


def missing(prompt: Prompt, keys: Sequence[str]) -> str | None:
    """The keys that a prompt's metadata lack, and what they have, in words; None: they lack none."""
    absent = [repr(key) for key in keys if prompt.metadata.get(key) is None]
    if not absent:
        return None
    there = ", ".join(repr(key) for key, value in prompt.metadata.items() if value is not None)
    return f"{', '.join(absent)}, but this prompt has {f'only {there}' if there else 'no metadata'}"


def quoted(prompts: Sequence[Prompt]) -> list[tuple[str, Prompt]]:
    """Prompts with their texts for places, where they have no better one."""
    return [(f"prompt {prompt.text!r}", prompt) for prompt in prompts]


def refuse_lacking(rewards: Sequence[RewardSpec], prompts: Sequence[Prompt], split: Split) -> None:
    """Every prompt of a list has the metadata and images that the rewards need; of files that is known at load.

    Raises:
        AegpoError: if one has not; the message names the first.
    """
    for message in lacking(rewards, quoted(prompts)):
        raise SettingError(message, "prompts", split)


def refuse_shared(train: Sequence[Prompt], held_out: Sequence[Prompt]) -> None:
    """Held-out prompts must not occur in training.

    Raises:
        AegpoError: if any does; the message names one.
    """
    known = {prompt.asked for prompt in train}
    shared = [prompt.text for prompt in held_out if prompt.asked in known]
    if shared:
        raise SettingError(
            f"{len(shared)} of {len(held_out)} evaluation prompts are trained on too, such as {shared[0]!r}; "
            "scores on them would not be held-out, so give 'prompts.evaluation' a file of its own, or set "
            "'prompts.shared: drop' to leave them out of training",
            "prompts",
        )


def refuse_few(prompts: int, per_step: int) -> None:
    """A step's prompts must not come twice in one pass over the list.

    Raises:
        AegpoError: if the list is shorter than a step.
    """
    if prompts < per_step:
        message = (
            f"{prompts} training prompts are fewer than the {per_step} of a step; lower 'rollouts.prompts_per_step'"
        )
        raise SettingError(message, "prompts")
