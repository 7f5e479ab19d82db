"""Which prompts of one file a run holds out, noted in its manifest: it goes on, and is looked at, with no others."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aegpo.core.experiment import Experiment
from aegpo.errors import CheckpointError
from aegpo.prompts.splitting import split_digests

KEY = "split"  # of a manifest
_SIDES = {"train": "trained on", "evaluation": "held out"}


def noted_split(experiment: Experiment) -> dict[str, Any]:
    """What a manifest has of the split; nothing where no one file is for both lists.

    Raises:
        SettingError: if the file cannot be read.
    """
    digests = split_digests(experiment)
    return {} if digests is None else {KEY: digests}


def check_split(folder: Path, manifest: Mapping[str, Any], experiment: Experiment) -> None:
    """Refuses a file of prompts that is not split as it was when the run was begun.

    Raises:
        CheckpointError: if another prompt is trained on or held out, or in another order.
        SettingError: if the file cannot be read.
    """
    noted, now = manifest.get(KEY), split_digests(experiment)
    if noted is None or now is None or noted == now:
        return
    sides = " and ".join(words for side, words in _SIDES.items() if noted.get(side) != now[side])
    raise CheckpointError(
        f"{experiment.prompts.file} was changed since {folder} was begun, and other prompts of it are {sides}: put it "
        "back as it was, start the run over with --fresh, or keep both with another --out"
    )
