"""What `aegpo evaluate` found: scores by style with their intervals, as tables and as one self-contained page.

S counts seeds, N images a prompt, K prompts.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from aegpo.core.records import FloatArray
from aegpo.report.statistics import Interval, crossed_interval, mean_interval
from aegpo.report.tables import Table
from aegpo.report.templating import render
from aegpo.report.wording import decimals, interval, signed

if TYPE_CHECKING:
    from PIL.Image import Image

ALL = "all"  # the row of every style together


@dataclass(frozen=True)
class StyleScores:
    """Scores of a style's prompts, by reward."""

    style: str
    prompts: tuple[str, ...]  # K
    base: Mapping[str, FloatArray]  # (S, N, K) each; the same for every seed unless the reward compares the two
    policy: Mapping[str, FloatArray] | None  # (S, N, K) each, beside the base's; None: there is no policy


@dataclass(frozen=True)
class Line:
    """One reward on one style: means over images and prompts."""

    reward: str
    style: str
    prompts: int
    base: float
    base_interval: Interval | None  # for new prompts
    policy: float | None
    gain: float | None  # policy minus base, prompt by prompt from the same noise
    gain_interval: Interval | None  # for new prompts; with several seeds, for new seeds too
    better: float | None  # share of prompts where the policy's score is higher; half of those where it is equal


@dataclass(frozen=True)
class Evaluated:
    """Everything that tables and page show."""

    title: str
    lines: tuple[Line, ...]
    seeds: int  # of the policy; 0: there is none
    settings: Mapping[str, str]
    by: str = "style"  # what styles are: a key of the prompts' metadata


def compare(
    title: str, styles: Sequence[StyleScores], labels: Sequence[str], settings: Mapping[str, str], by: str = "style"
) -> Evaluated:
    """Every reward on every style, and on all of them together where there are several."""
    lines: list[Line] = []
    for label in labels:
        base = {each.style: each.base[label].mean(axis=1) for each in styles}  # (S, K)
        policy = {each.style: each.policy[label].mean(axis=1) for each in styles if each.policy is not None}
        lines += [_line(label, style, base[style], policy.get(style)) for style in base]
        if len(styles) > 1:
            joined = np.concatenate(list(policy.values()), axis=1) if policy else None
            lines.append(_line(label, ALL, np.concatenate(list(base.values()), axis=1), joined))
    seeds = next(iter(styles[0].base.values())).shape[0] if styles[0].policy is not None else 0
    return Evaluated(title, tuple(lines), seeds, settings, by)


def _line(label: str, style: str, base: FloatArray, policy: FloatArray | None) -> Line:  # (S, K)
    known = (label, style, base.shape[1], float(base.mean()), mean_interval(base.mean(axis=0)))
    if policy is None:
        return Line(*known, None, None, None, None)
    gain = policy - base
    ci = mean_interval(gain[0]) if len(gain) == 1 else crossed_interval(gain)
    better = float((gain > 0).mean() + (gain == 0).mean() / 2)
    return Line(*known, float(policy.mean()), float(gain.mean()), ci, better)


def tables(found: Evaluated) -> Iterator[Table]:
    """A table for each reward."""
    for label in dict.fromkeys(line.reward for line in found.lines):
        lines = [line for line in found.lines if line.reward == label]
        intervals = [line.gain_interval if found.seeds else line.base_interval for line in lines]
        places = max(3, min(6, decimals([each.half_width for each in intervals if each])))
        if found.seeds:
            columns = (found.by, "prompts", "base", "policy", "gain", "95 % CI", "policy better on")
            yield Table(label, columns, tuple(_paired(line, places) for line in lines))
        else:
            yield Table(label, (found.by, "prompts", "score", "95 % CI"), tuple(_alone(line, places) for line in lines))


def _paired(line: Line, places: int) -> tuple[str, ...]:
    assert line.policy is not None
    assert line.gain is not None
    assert line.better is not None
    scores = (f"{line.base:.{places}f}", f"{line.policy:.{places}f}", signed(line.gain, places))
    return line.style, str(line.prompts), *scores, interval(line.gain_interval, places), f"{100 * line.better:.0f} %"


def _alone(line: Line, places: int) -> tuple[str, ...]:
    return line.style, str(line.prompts), f"{line.base:.{places}f}", interval(line.base_interval, places)


def meaning(found: Evaluated) -> str:
    """What the intervals are for."""
    if not found.seeds:
        return "95 % t interval of the mean score, for new prompts of the same kind."
    paired = "95 % CI of the gain, policy minus base on the same prompt and start noise"
    if found.seeds == 1:
        return f"{paired}, for new prompts of the same kind. One seed says nothing about other seeds of the training."
    return f"{paired}, over {found.seeds} seeds, for new seeds and new prompts alike (Banerjee 1960)."


def page(found: Evaluated, sheet: Image) -> str:
    """The whole page."""
    stream = io.BytesIO()
    sheet.save(stream, format="PNG", optimize=True)
    painted = "Prompts with what the base and the policy paint" if found.seeds else "Prompts with what is painted"
    return render(
        "evaluation.html",
        {
            "name": found.title,
            "tables": tuple(tables(found)),
            "meaning": meaning(found),
            "alternative": painted,
            "sheet": base64.b64encode(stream.getvalue()).decode(),
            "settings": tuple(found.settings.items()),
        },
    )
