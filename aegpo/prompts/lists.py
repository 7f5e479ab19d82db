"""The lists of prompts: read, numbered, and refused where a run could not use them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from aegpo.core import contracts
from aegpo.core.experiment import Experiment
from aegpo.core.parts import RewardSpec
from aegpo.core.problems import Problem
from aegpo.core.records import Prompt
from aegpo.core.sections import DatasetPrompts
from aegpo.errors import AegpoError, SettingError
from aegpo.prompts.sources import Asked, read_dataset, read_file, read_places

Split = Literal["train", "evaluation"]


def read_prompts(experiment: Experiment, split: Split) -> tuple[Prompt, ...]:
    """The prompts of a split, by their index: of its file or dataset with their metadata, or the model's own captions.

    Raises:
        AegpoError: if they cannot be read or there are none.
    """
    spec = experiment.prompts
    source, count = (spec.train, spec.train_count) if split == "train" else (spec.evaluation, spec.evaluation_count)
    if source is None:
        return numbered(experiment.model.captions(split, count, spec.seed))
    dropped = set[Asked]()
    if split == "train" and spec.shared == "drop":
        dropped = {prompt.asked for prompt in read_prompts(experiment, "evaluation")}
    if isinstance(source, DatasetPrompts):
        return read_dataset(source, dropped, count)
    return numbered([prompt for prompt in read_file(source) if prompt.asked not in dropped][:count])


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


def problems(experiment: Experiment) -> Iterator[Problem]:
    """Prompts that the chosen rewards cannot score: found before a run, the first prompt of each file.

    Files are read only where a reward is particular about prompts, needs metadata or images, or where the model reads
    images; datasets are not read at load.
    """
    every = (*experiment.rewards, *experiment.evaluation.rewards)
    spec = experiment.prompts
    asked: list[tuple[Split, Path | DatasetPrompts | None, Sequence[RewardSpec]]]
    asked = [("train", spec.train, experiment.rewards), ("evaluation", spec.evaluation, every)]
    for split, source, rewards in asked:
        choosy = [each for each in rewards if each.particular or each.needs_metadata or each.needs_images]
        if isinstance(source, DatasetPrompts) or not (choosy or experiment.model.reads_images):
            continue
        if source is None:
            yield from _bare_captions(experiment, split, choosy)
            continue
        try:
            message = next(_refused(choosy, _used(experiment, split, read_places(source))), None)
        except AegpoError as error:
            message = error.message
        if message is not None:
            yield Problem(("prompts", split), message)


def _bare_captions(experiment: Experiment, split: Split, rewards: Sequence[RewardSpec]) -> Iterator[Problem]:
    """Captions have no images, and of metadata what their model says."""
    reward = next((reward for reward in rewards if reward.needs_images), None)
    if reward is not None:
        yield Problem(
            ("prompts",),
            f"reward {reward.label!r} needs an image, but captions of model {experiment.model.kind!r} have none; name "
            f"a file that has some as {split!r}",
        )
    there = set(experiment.model.caption_metadata)
    reward = next((reward for reward in rewards if set(reward.needs_metadata) - there), None)
    if reward is not None:
        needed = ", ".join(repr(key) for key in reward.needs_metadata if key not in there)
        yield Problem(
            ("prompts",),
            f"reward {reward.label!r} needs {needed}, but captions of model {experiment.model.kind!r} have no "
            f"metadata; name a file that has it as {split!r}",
        )


def _refused(rewards: Sequence[RewardSpec], places: Iterable[tuple[str, Prompt]]) -> Iterator[str]:
    """The prompts that rewards lack something of or cannot score, with their places."""
    for where, prompt in places:
        yield from lacking(rewards, [(where, prompt)])
        for reward in rewards:
            with contracts.blaming("reward", reward.label):
                why = reward.refuses(prompt) if reward.particular else None
            if why is not None:
                yield f"{where}: reward {reward.label!r} cannot score this prompt: {why}"


def lacking(rewards: Sequence[RewardSpec], places: Iterable[tuple[str, Prompt]]) -> Iterator[str]:
    """The prompts without metadata or an image that a reward needs, with their places; a null counts as absent."""
    for where, prompt in places:
        for reward in rewards:
            if reward.needs_images and not prompt.images:
                yield f"{where}: reward {reward.label!r} needs an image, but this prompt has none; name one as 'image'"
            missing = [repr(key) for key in reward.needs_metadata if prompt.metadata.get(key) is None]
            if missing:
                there = ", ".join(repr(key) for key, value in prompt.metadata.items() if value is not None)
                has = f"only {there}" if there else "no metadata"
                yield f"{where}: reward {reward.label!r} needs {', '.join(missing)}, but this prompt has {has}"


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


def _used(experiment: Experiment, split: Split, places: Mapping[str, Prompt]) -> list[tuple[str, Prompt]]:
    """Places of the prompts of a file that a run takes, as `read_prompts` does."""
    spec = experiment.prompts
    placed = list(places.items())
    if split == "train" and spec.shared == "drop" and not isinstance(spec.evaluation, DatasetPrompts):
        held_out = {prompt.asked for prompt in read_prompts(experiment, "evaluation")}
        placed = [(where, prompt) for where, prompt in placed if prompt.asked not in held_out]
    return placed[: spec.train_count if split == "train" else spec.evaluation_count]


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
