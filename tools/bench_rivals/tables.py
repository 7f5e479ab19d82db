"""The section of tools/BENCHMARKS.md."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from bench_rivals import models
from bench_rivals.turns import Series

SAME_COUNTS, SAME_GRADIENT = 1.03, 1e-5  # at most
RATES = {1: 1.25, 2: 1.1}  # at least, by updates of a step
AIMED_AT = ("Flow-GRPO", "Flow-Factory")  # whose rates have an aim


@dataclass
class Comparison:
    """A rival and aegpo, with so many optimizer updates in a training step."""

    title: str
    tree: bool
    updates: int
    rival: Series
    ours: Sequence[Series]  # once, or for each way to retain
    failure: str | None

    def at(self, retain: str) -> Series:
        """aegpo with a way to retain; if there is no such option, or it was not asked for, as it was measured."""
        return next((series for series in self.ours if series.case.retain == retain), self.ours[-1])

    def ratios(self, series: Series) -> list[float]:
        """aegpo's time to the rival's, turn by turn."""
        return [own / other for own, other in zip(series.seconds, self.rival.seconds, strict=True)]

    @property
    def gradient(self) -> float | None:
        """The largest relative L2 difference of gradients."""
        found = [series.warm_up.said.get("gradient") for series in self.ours if series.warm_up is not None]
        known = [value for value in found if value is not None]
        return max(known, default=None)

    def brief(self) -> str:
        """One line."""
        if self.failure is not None:
            return "did not run"
        each = (f"{median(self.ratios(series)):.3f} (retain {series.case.retain})" for series in self.ours)
        return f"time to the rival's {', '.join(each)}; gradients {self.apart}"

    @property
    def apart(self) -> str:
        """By how much gradients differ, in words."""
        return "not compared" if self.gradient is None else f"{self.gradient:.1e} apart"


def section(found: Sequence[Comparison], options: argparse.Namespace) -> list[str]:
    """Both tables, trees apart, and what did not run."""
    ran = [each for each in found if each.failure is None]
    chains, trees = [each for each in ran if not each.tree], [each for each in ran if each.tree]
    kind = "processor time" if options.device == "cpu" else "wall-clock"
    lines = [
        f"Training steps of the rivals' own code and of aegpo, in turns ({options.turns} each after one to warm up): "
        f"the same random network, 2 prompts x {options.group} rollouts, 10 denoising steps of {models.PIXELS} x "
        f"{models.PIXELS} pixels (256 tokens), float32, no guidance, the mean pixel as reward, full fine-tuning, "
        f"batches as large as the rival's; {kind}, seconds, medians; ratios are of turns: median (least to most). Rows "
        "that the network is evaluated on, without + with gradient, are counted on both sides.",
        "",
        f"At equal counts{_retained(chains, 'never')}; at most {SAME_COUNTS}:",
        "",
        *equal_counts(chains),
        "",
        f"For the same training signal{_retained(chains, 'auto')}: prompts, rollouts, trained edges and updates. "
        "Gradients are of the first update, where a step has one, both from what the rival sampled, by its own loss "
        f"and by ours: relative L2 difference, at most {SAME_GRADIENT:.0e}.",
        "",
        *same_signal(chains),
        "",
    ]
    if trees:
        lines += ["Trees, whose shared prefixes make another signal than independent rollouts:", ""]
        lines += [*equal_counts(trees), "", *same_signal(trees), ""]
    for each in found:
        if each.failure is not None:
            lines += [f"Did not run: {each.title}, {each.updates} updates: {each.failure.splitlines()[-1]}", ""]
    return lines[:-1]


def equal_counts(found: Sequence[Comparison]) -> list[str]:
    """aegpo's time to each rival's, where nothing is retained."""
    lines = [
        "| rival | updates | rows: rival | aegpo | s: rival | aegpo | aegpo / rival | |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for each in found:
        own = each.at("never")
        ratio, others = median(each.ratios(own)), each.rival
        verdict = "reached" if ratio <= SAME_COUNTS else "missed"
        verdict = verdict if others.rows == own.rows else "other counts"
        lines.append(
            f"| {each.title} | {each.updates} | {others.rows} | {own.rows} | {median(others.seconds):.2f} | "
            f"{median(own.seconds):.2f} | {_spread(each.ratios(own))} | {verdict} |"
        )
    return lines


def same_signal(found: Sequence[Comparison]) -> list[str]:
    """How alike the gradients are, and how many steps aegpo makes while the rival makes one."""
    lines = [
        "| rival | updates | gradients differ by | rows: rival | aegpo | steps of aegpo / of the rival | at least | |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for each in found:
        own = each.at("auto")
        rates = [1 / ratio for ratio in each.ratios(own)]
        aim = RATES.get(each.updates) if each.title in AIMED_AT else None
        verdicts = [] if aim is None else ["reached" if median(rates) >= aim else "missed"]
        if each.gradient is not None and each.gradient > SAME_GRADIENT:
            verdicts.append("other gradient")
        differ = "-" if each.gradient is None else f"{each.gradient:.1e}"
        lines.append(
            f"| {each.title} | {each.updates} | {differ} | {each.rival.rows} | {own.rows} | {_spread(rates)} | "
            f"{'-' if aim is None else aim} | {', '.join(verdicts)} |"
        )
    return lines


def _spread(values: Sequence[float]) -> str:
    return f"{median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def _retained(found: Sequence[Comparison], retain: str) -> str:
    """How the option stood, if there is one."""
    used = {each.at(retain).case.retain for each in found} - {None}
    return f" (`optimizer.retain: {used.pop()}`)" if used else ""
