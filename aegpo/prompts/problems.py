"""What is wrong with the prompts of an experiment, found before a run; and what of its files is not used."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import get_args

from aegpo.core import contracts
from aegpo.core.experiment import Experiment
from aegpo.core.parts import RewardSpec
from aegpo.core.problems import Location, Problem
from aegpo.core.records import Prompt
from aegpo.core.registries import with_shipper
from aegpo.core.sections import DatasetPrompts, Split
from aegpo.errors import AegpoError
from aegpo.prompts.entries import columns_left_out
from aegpo.prompts.files import read_places, unread
from aegpo.prompts.lists import captions, lacking, quoted, refuse_few, refuse_shared
from aegpo.prompts.splitting import split_file

Placed = list[tuple[str, Prompt]]  # prompts of a list with their places


class PromptProblems:
    """What is wrong with the prompts of the arms of a file; lists that arms share are read once."""

    def __init__(self) -> None:
        self._found: list[tuple[Experiment, tuple[Problem, ...]]] = []

    def of(self, experiment: Experiment) -> tuple[Problem, ...]:
        """As `problems`."""
        for other, known in self._found:
            if _same(experiment, other):
                return known
        found = tuple(problems(experiment))
        self._found.append((experiment, found))
        return found


def _same(one: Experiment, other: Experiment) -> bool:
    """Whether two experiments ask the same of the same prompts."""
    rewards = (one.rewards, one.evaluation.rewards) == (other.rewards, other.evaluation.rewards)
    steps = one.rollouts.prompts_per_step == other.rollouts.prompts_per_step
    return rewards and steps and (one.prompts, one.model) == (other.prompts, other.model)


def problems(experiment: Experiment) -> Iterator[Problem]:
    """What is wrong with the lists of prompts, the first thing of each, and in valid ones what is not used.

    Datasets are not read at load.
    """
    lists: dict[Split, Placed] = {}
    for split in _splits(experiment):
        try:
            lists[split] = _read(experiment, split)
        except AegpoError as error:
            yield Problem(_counted(experiment, split), with_shipper(error, error.message))
            if error.part is not None or experiment.prompts.file is not None:  # as true of the other list
                return
    if len(lists) < len(_splits(experiment)):
        return
    train, held_out = _used(experiment, lists), lists.get("evaluation", [])[: experiment.prompts.evaluation_count]
    wrong = [*_unscored(experiment, "train", train), *_unscored(experiment, "evaluation", held_out)]
    wrong += _refused_lists(experiment, _prompts(train), _prompts(held_out))
    yield from wrong or _cautions(experiment, lists)


def _splits(experiment: Experiment) -> tuple[Split, ...]:
    """The lists that are known at load."""
    splits: tuple[Split, ...] = get_args(Split)
    return tuple(split for split in splits if not isinstance(experiment.prompts.source(split), DatasetPrompts))


def _file(experiment: Experiment, split: Split) -> Path | None:
    source = experiment.prompts.source(split)
    return source if isinstance(source, Path) else None


def _read(experiment: Experiment, split: Split) -> Placed:
    """All of a file, or its side of one that is for both lists, or the captions that are asked for."""
    file, spec = _file(experiment, split), experiment.prompts
    if spec.file is not None:
        train, held_out = split_file(experiment)
        return list((train if split == "train" else held_out).items())
    if file is not None:
        return list(read_places(file).items())
    count = spec.train_count if split == "train" else spec.evaluation_count
    return quoted(captions(experiment, split, count))


def _counted(experiment: Experiment, split: Split) -> Location:
    """The key that names a list: its file, or how many captions it has."""
    return _named(experiment, split) if _file(experiment, split) is not None else ("prompts", f"{split}_count")


def _named(experiment: Experiment, split: Split) -> Location:
    """The key that names, or would name, the file of a list."""
    return ("prompts", split if experiment.prompts.file is None else "file")


def _prompts(placed: Placed) -> list[Prompt]:
    return [prompt for _, prompt in placed]


def _not_held_out(experiment: Experiment, lists: dict[Split, Placed]) -> Placed:
    """Training prompts without those that are dropped, as far as the held-out ones are known."""
    if experiment.prompts.shared != "drop":
        return lists.get("train", [])
    used = lists.get("evaluation", [])[: experiment.prompts.evaluation_count]
    held_out = {prompt.asked for prompt in _prompts(used)}
    return [(where, prompt) for where, prompt in lists.get("train", []) if prompt.asked not in held_out]


def _used(experiment: Experiment, lists: dict[Split, Placed]) -> Placed:
    """The training prompts that a run takes, as `read_prompts` does."""
    return _not_held_out(experiment, lists)[: experiment.prompts.train_count]


# --- what is wrong ---------------------------------------------------------------------------------------------------


def _unscored(experiment: Experiment, split: Split, placed: Placed) -> Iterator[Problem]:
    """The first prompt of a list that a reward cannot score or lacks something of."""
    held_out = experiment.evaluation.rewards if split == "evaluation" else ()
    every = (*experiment.rewards, *held_out)
    choosy = [each for each in every if each.particular or each.needs_metadata or each.needs_images]
    if choosy and placed and _file(experiment, split) is None:
        yield from _bare_captions(experiment, split, choosy)
        return
    try:
        message = next(_refused(choosy, placed), None)
    except AegpoError as error:  # of the reward that was asked
        message = with_shipper(error, error.message)
    if message is not None:
        yield Problem(_named(experiment, split), message)


def _bare_captions(experiment: Experiment, split: Split, rewards: Sequence[RewardSpec]) -> Iterator[Problem]:
    """Captions have no images, and of metadata what their model says."""
    reward = next((reward for reward in rewards if reward.needs_images), None)
    if reward is not None:
        yield Problem(
            ("prompts",),
            f"reward {reward.label!r} needs an image, but captions of model {experiment.model.kind!r} have none; name "
            f"a file that has some as {split!r}",
        )
    there = experiment.model.caption_metadata
    reward = next((reward for reward in rewards if set(reward.needs_metadata) - set(there)), None)
    if reward is not None:
        needed = ", ".join(repr(key) for key in reward.needs_metadata if key not in there)
        has = f"only {', '.join(map(repr, there))}" if there else "no metadata"
        yield Problem(
            ("prompts",),
            f"reward {reward.label!r} needs {needed}, but captions of model {experiment.model.kind!r} have {has}; name "
            f"a file that has it as {split!r}",
        )


def _refused(rewards: Sequence[RewardSpec], places: Iterable[tuple[str, Prompt]]) -> Iterator[str]:
    """The prompts that rewards lack something of or cannot score, with their places."""
    for where, prompt in places:
        yield from lacking(rewards, [(where, prompt)])
        for reward in rewards:
            with contracts.blaming("reward", reward.label, kind=reward.kind):
                why = reward.refuses(prompt) if reward.particular else None
            if why is not None:
                yield f"{where}: reward {reward.label!r} cannot score this prompt: {why}"


def _refused_lists(experiment: Experiment, train: Sequence[Prompt], held_out: Sequence[Prompt]) -> Iterator[Problem]:
    """Lists that share prompts, or are shorter than a step."""
    known = "train" in _splits(experiment)
    count, per_step = len(train) if known else experiment.prompts.train_count, experiment.rollouts.prompts_per_step
    at = _counted(experiment, "train") if known else ("prompts", "train_count")
    checks: list[tuple[Location, Callable[[], None]]] = [
        (("prompts", "evaluation"), lambda: refuse_shared(train, held_out)),
        (at, lambda: refuse_few(count, per_step)),
    ]
    for place, check in checks:
        try:
            check()
        except AegpoError as error:
            yield Problem(place, error.message)


# --- what is not used ------------------------------------------------------------------------------------------------


def _cautions(experiment: Experiment, lists: dict[Split, Placed]) -> Iterator[Problem]:
    """What of files is not used, and what is asked more than once."""
    free = {"train": _not_held_out(experiment, lists), "evaluation": lists.get("evaluation", [])}
    for split in _splits(experiment):
        file, every, left = _file(experiment, split), lists[split], free[split]
        if file is None:
            continue
        if len(left) < len(every):
            dropped = f"{len(every) - len(left):,} of {len(every):,} prompts of {file} are held out and not trained on"
            yield Problem(("prompts", "shared"), dropped, warning=True)
        count = experiment.prompts.train_count if split == "train" else experiment.prompts.evaluation_count
        if count < len(left):
            verb = "trained on" if split == "train" else "evaluated"
            message = f"only the first {count:,} of {len(left):,} prompts of {file} are {verb}; {len(left)} takes all"
            yield Problem(("prompts", f"{split}_count"), message, warning=True)
        if columns := unread(file):
            yield Problem(_named(experiment, split), f"{file}: {columns_left_out(columns)}", warning=True)
        for told in (_repeated(file, left[:count]), _unseen(experiment, split, left[:count])):
            if told is not None:
                yield Problem(_named(experiment, split), told, warning=True)


def _unseen(experiment: Experiment, split: Split, placed: Placed) -> str | None:
    """What is said of images that nobody looks at."""
    shown = [where for where, prompt in placed if prompt.images]
    held_out = experiment.evaluation.rewards if split == "evaluation" else ()
    if not shown or experiment.model.reads_images:
        return None
    if any(reward.needs_images for reward in (*experiment.rewards, *held_out)):
        return None
    return (
        f"{len(shown):,} of {len(placed):,} prompts name images, the first {shown[0]}; neither model "
        f"{experiment.model.kind!r} nor a reward says that it reads them"
    )


def _repeated(file: Path, placed: Placed) -> str | None:
    """What is said of a file whose prompts occur more than once."""
    first: dict[object, str] = {}
    again = [(first[prompt.asked], where) for where, prompt in placed if first.setdefault(prompt.asked, where) != where]
    if not again:
        return None
    before, now = (where.removeprefix(f"{file}, ") for where in again[0])
    return (
        f"{len(again):,} of {len(placed):,} prompts of {file} repeat another and are asked as often as they are there, "
        f"such as {now}, which is {before} again; remove them if that is not meant"
    )
