"""What `aegpo evaluate` paints: prompts in the order of their list, each with the style whose row and folder it is in.

Styles only sort what was painted. A prompt has the noise and the neighbours that it has without them, so that its
scores are the same to the bit.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from aegpo.commands.evaluate_request import EvaluateRequest
from aegpo.core.experiment import Experiment
from aegpo.core.parts import RewardSpec
from aegpo.core.records import Prompt
from aegpo.core.registry import LONGEST_NAME
from aegpo.errors import AegpoError
from aegpo.prompts.entries import short
from aegpo.prompts.files import read_places
from aegpo.prompts.lists import lacking, missing, numbered, quoted, read_prompts
from aegpo.prompts.splitting import split_file
from aegpo.report.evaluated import ALL
from aegpo.rewards.hpsv2_prompts import benchmark_prompts

HPSV2 = "hpsv2"  # of --prompts: the benchmark
HELD_OUT = "held-out"  # the style of an experiment's own evaluation prompts

Placed = Sequence[tuple[str, Prompt]]  # prompts of a list with their places


@dataclass(frozen=True)
class Styled:
    """A prompt, and where what is painted for it belongs."""

    style: str
    number: int  # of the prompts of its style, from 0
    prompt: Prompt


def styled_prompts(request: EvaluateRequest, experiment: Experiment, specs: Sequence[RewardSpec]) -> tuple[Styled, ...]:
    """The prompts: of the benchmark with its styles, else with their values under a key, or one style for all.

    Raises:
        AegpoError: if they cannot be read, lack what a reward or `by` needs, or have values that cannot be styles.
    """
    if request.prompts == HPSV2:
        if request.by is not None:
            raise AegpoError(
                f"--by {request.by} sorts prompts by their metadata, but those of --prompts {HPSV2} have none and a "
                "row for each style already; leave --by out"
            )
        placed, styles = _benchmark()
    else:
        placed = _held_out(experiment) if request.prompts is None else _of_file(Path(request.prompts))
        name = HELD_OUT if request.prompts is None else Path(request.prompts).stem
        styles = [name] * len(placed) if request.by is None else list(_values(request.by, placed))
    for message in lacking(specs, placed):
        raise AegpoError(message)
    numbers: Counter[str] = Counter()
    found: list[Styled] = []
    for style, (_, prompt) in zip(styles, placed, strict=True):
        found.append(Styled(style, numbers[style], prompt))
        numbers[style] += 1
    return tuple(found)


def _benchmark() -> tuple[Placed, list[str]]:
    """Numbered together, so that no two prompts have the same noise."""
    found = benchmark_prompts()
    styles = [style for style, texts in found.items() for _ in texts]
    return quoted(numbered(chain.from_iterable(found.values()))), styles


def _held_out(experiment: Experiment) -> Placed:
    prompts, source = read_prompts(experiment, "evaluation"), experiment.prompts.source("evaluation")
    if experiment.prompts.file is not None:
        return list(zip(split_file(experiment)[1], prompts, strict=True))
    # Of a file a run takes the first ones, whose places are its lines.
    return list(zip(read_places(source), prompts, strict=False)) if isinstance(source, Path) else quoted(prompts)


def _of_file(path: Path) -> Placed:
    places = read_places(path)
    return list(zip(places, numbered(places.values()), strict=True))


# --- values as styles ------------------------------------------------------------------------------------------------


def _values(key: str, placed: Placed) -> Iterator[str]:
    """What each prompt has under a key: a text as it is, a number or truth value as JSON has it.

    Raises:
        AegpoError: at the first prompt that has nothing there, or nothing that can name a row and a folder.
    """
    first: dict[str, tuple[object, str]] = {}  # by what file systems may take for the same name
    for where, prompt in placed:
        if (lacks := missing(prompt, (key,))) is not None:
            raise AegpoError(f"{where}: --by {key} needs {lacks}")
        value = prompt.metadata[key]
        if (why := _why_no_style(value)) is not None:
            raise AegpoError(
                f"{where}: --by {key} makes a row and a folder of each value, but {short(value)} {why}; texts and "
                f"numbers of at most {LONGEST_NAME} bytes, without slashes or a dot in front, can be values"
            )
        name = value if isinstance(value, str) else json.dumps(value)
        known, there = first.setdefault(name.casefold(), (value, where))
        if (type(known), known) != (type(value), value):
            raise AegpoError(
                f"{where}: --by {key} makes a folder of each value, but {short(value)} and {short(known)}, of {there}, "
                "may be one folder; write both the same, or call one otherwise"
            )
        yield name


def _why_no_style(value: object) -> str | None:
    """Why a value can name no row and no folder, anywhere; None: it can."""
    if not isinstance(value, str | int | float) or (isinstance(value, float) and not math.isfinite(value)):
        return "is no text or number"
    name = value if isinstance(value, str) else json.dumps(value)
    if name == ALL:
        return "is what the row of all prompts is called"
    if not name.isprintable():
        return "has letters that no table can show"
    if name != name.strip():
        return "begins or ends with a space" if name.strip() else "is blank"
    wrong = {"is empty": not name, "has a slash": "/" in name or "\\" in name, "begins with a dot": name[:1] == "."}
    wrong["is longer"] = len(name.encode()) > LONGEST_NAME
    return next((why for why, is_so in wrong.items() if is_so), None)
