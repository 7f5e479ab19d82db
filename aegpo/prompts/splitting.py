"""One file of prompts for training and evaluation: which of them are held out.

Our choice: the prompts with the lowest SHA-256 of the seed, their text and the names of their images. So it matters
neither in which order a file has its prompts nor how it is sorted, and every machine chooses alike.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from aegpo.core.experiment import Experiment
from aegpo.core.records import Prompt
from aegpo.errors import SettingError
from aegpo.prompts.datasets import Asked
from aegpo.prompts.files import read_places


def split_file(experiment: Experiment) -> tuple[dict[str, Prompt], dict[str, Prompt]]:
    """Training and held-out prompts of `prompts.file` by their places, both in the order of the file.

    `prompts.evaluation_count` different prompts are held out, each where it comes first. No prompt is on both sides:
    what repeats a held-out one is left out. What else repeats is trained on as often as it is there.

    Raises:
        SettingError: if the file cannot be read, or too few different prompts are left for a training step.
    """
    spec = experiment.prompts
    assert spec.file is not None, "there is a file"
    places = read_places(spec.file)
    first = dict[Asked, str]()
    for where, prompt in places.items():
        first.setdefault(prompt.asked, where)
    ranked = sorted(first, key=lambda asked: _rank(asked, spec.file, spec.seed))
    chosen = set(ranked[: spec.evaluation_count])
    train = {where: prompt for where, prompt in places.items() if prompt.asked not in chosen}
    held_out = {where: prompt for where, prompt in places.items() if first[prompt.asked] == where}
    held_out = {where: prompt for where, prompt in held_out.items() if prompt.asked in chosen}
    _refuse_few(experiment, spec.file, len(first))
    return train, held_out


def split_digests(experiment: Experiment) -> dict[str, str] | None:
    """SHA-256 of what is trained on and of what is held out, by which a run knows its split again; None: no `file`.

    Raises:
        SettingError: as `split_file`.
    """
    spec = experiment.prompts
    if spec.file is None:
        return None
    train, held_out = split_file(experiment)
    sides = {"train": list(train.values())[: spec.train_count], "evaluation": list(held_out.values())}
    folder = spec.file.parent
    return {
        side: hashlib.sha256(b"\n".join(_told(prompt.asked, folder) for prompt in prompts)).hexdigest()
        for side, prompts in sides.items()
    }


def _refuse_few(experiment: Experiment, file: Path, different: int) -> None:
    step, count = experiment.rollouts.prompts_per_step, experiment.prompts.evaluation_count
    left = different - count
    if left >= step:
        return
    most = different - step
    way = f"lower 'evaluation_count' to {most} or less" if most > 0 else "lower 'rollouts.prompts_per_step'"
    has = f"{different} different prompt{'' if different == 1 else 's'}"
    raise SettingError(
        f"{file} has {has}; with {count} held out {max(0, left) or 'none'} would be left, fewer than "
        f"the {step} of a training step: {way}, or add prompts",
        "prompts",
    )


def _rank(asked: Asked, file: Path | None, seed: int) -> bytes:
    assert file is not None, "there is a file"
    return hashlib.sha256(b"%d\n%s" % (seed, _told(asked, file.parent))).digest()


def _told(asked: Asked, folder: Path) -> bytes:
    """What is asked for, the same wherever the folder of the file lies."""
    text, images = asked
    names = [Path(os.path.relpath(image, folder)).as_posix() for image in images]
    return json.dumps([text, *names], ensure_ascii=True).encode()
