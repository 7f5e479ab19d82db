"""The tables of the report as text, for the terminal and the page alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from aegpo.method.costs import BACKWARD
from aegpo.report.recorded import Study
from aegpo.report.summary import Score, Summary
from aegpo.report.wording import count, decimals, interval, label_decimals, plural, signed

NONE = "-"
NOISE = (
    "Standard deviation of the noise that stochastic steps added and no later step took out, in units of the start "
    "noise: by the coefficients of each plan, for a network that is never wrong. Rewards see it; 0: all was taken out."
)


@dataclass(frozen=True)
class Table:
    """A table of text; the first column names the rows."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


def score_tables(summary: Summary) -> Iterator[Table]:
    """A table for each evaluation label: base, final, gain and paired difference of every arm."""
    first = summary.arms[0]
    columns = ("arm", "seeds", "base", "final", "gain", "95 % CI", f"minus {first}", "CI over seeds", "CI also prompts")
    for label in summary.labels:
        rows = summary.under(label)
        role = "trained" if rows[0].trained else "guard: scored, never optimised"
        if len({row.trained for row in rows}) > 1:
            role = "trained in some arms: " + ", ".join(row.arm for row in rows if row.trained)
        places = label_decimals(summary, label)
        cells = tuple(_score_cells(row, places) for row in rows)
        yield Table(f"{label} ({role})", (*columns, "detectable", "p (Holm)"), cells)


def _score_cells(row: Score, places: int) -> tuple[str, ...]:
    # one seed says nothing about other seeds, so its interval is marked
    mark = "" if len(row.seeds) > 1 else " (prompts only)"
    gain = (signed(row.gain, places), interval(row.gain_interval, places) + mark)
    head = (row.arm, str(len(row.seeds)), f"{row.base:.{places}f}", f"{row.final:.{places}f}", *gain)
    if row.difference is None:
        return (*head, *[NONE] * 5)
    each = row.difference
    return (
        *head,
        signed(each.mean, places),
        interval(each.over_seeds, places),
        interval(each.over_both, places),
        "not possible" if each.smallest_detectable is None else f"{each.smallest_detectable:.{places}f}",
        "not possible" if each.p_holm is None else f"{each.p_holm:.2g}",
    )


def cost_table(summary: Summary) -> Table:
    """What every arm spent, mean over its finished seeds."""
    columns = (
        "arm",
        "steps",
        "forwards",
        "of these signals",
        "trained edges",
        "cost",
        "relative",
        "s per step",
        "s in all",
    )
    equal = [cost.gain_at_equal_cost for cost in summary.costs]
    places = max(3, decimals(equal))
    rows = tuple(
        (
            cost.arm,
            str(cost.steps),
            count(cost.forwards),
            count(cost.signal_forwards),
            count(cost.trained_edges),
            count(cost.cost),
            NONE if cost.relative_cost is None else f"{cost.relative_cost:.2f} x",
            f"{cost.training_seconds / cost.steps:.2f}",
            count(cost.total_seconds),
            NONE if cost.gain_at_equal_cost is None else signed(cost.gain_at_equal_cost, places),
        )
        for cost in summary.costs
    )
    note = (
        f"Cost = forwards + {BACKWARD} x trained edges, and 1 more for each frozen policy evaluated there. "
        "Seconds per step are without evaluations and checkpoints. "
        f"Gain at equal cost: gain on {summary.headline} when an arm has spent what the cheapest arm spends in all."
    )
    return Table("What it cost", (*columns, "gain at equal cost"), rows, note)


def signals_table(summary: Summary) -> Table:
    """What the signals of every arm cost that spends forwards on them, as a share of a training step."""
    columns = ("arm", "entropy", "forwards per step", "of forwards", "s per step", "of a step's time", "agreement")
    rows = tuple(
        (
            each.arm,
            ", ".join(f"{name} {value}" for name, value in each.settings.items()) or NONE,
            count(each.forwards),
            f"{100 * each.forwards_share:.1f} %",
            f"{each.seconds:.2f}",
            NONE if each.seconds_share is None else f"{100 * each.seconds_share:.1f} %",
            "exact" if each.exact else "not measured",
        )
        for each in summary.signals
    )
    note = (
        "Forwards include those for the base policy's entropies, which each prompt needs once. Agreement: of a step's "
        "ranking of prompts and steps with the probe that measures every prompt anew, at all steps and rows; what "
        "cheaper settings keep of it is measured by tools/bench.py probe, not in a run."
    )
    return Table("What signals cost", columns, rows, note)


def noise_table(summary: Summary) -> Table:
    """How much noise every arm's stochastic steps left in the images that its rewards saw."""
    rows = tuple((each.arm, f"{each.mean:.4f}", f"{each.low:.4f}", f"{each.high:.4f}") for each in summary.noise)
    return Table("Noise left in training images", ("arm", "mean", "10th percentile", "90th percentile"), rows, NOISE)


def reach_table(summary: Summary) -> Table:
    """When every arm first reached the first arm's final score."""
    target = "" if summary.target is None else f" ({summary.target:.{label_decimals(summary, summary.headline)}f})"
    rows = tuple(
        (each.arm, count(each.steps), count(each.forwards), count(each.cost), count(each.seconds))
        for each in summary.reach
    )
    note = "Of the curve averaged over finished seeds, straight between evaluations; its first crossing."
    title = f"To reach {summary.arms[0]}'s final {summary.headline}{target}"
    return Table(title, ("arm", "steps", "forwards", "cost", "training seconds"), rows, note)


def difference_table(study: Study) -> Table:
    """Fields of the resolved spec in which arms differ."""
    arms = [arm for arm in study.arms if study.of(arm)]
    fields = {arm: dict(_flatten(study.of(arm)[0].experiment)) for arm in arms}
    keys = dict.fromkeys(key for arm in arms for key in fields[arm])
    rows = tuple(
        (key, *(fields[arm].get(key, NONE) for arm in arms))
        for key in keys
        if key not in ("seed", "name") and len({fields[arm].get(key) for arm in arms}) > 1
    )
    return Table("What differed between the arms", ("field", *arms), rows)


def _flatten(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _flatten(inner, f"{key}.{name}" if key else name)
    elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        for index, inner in enumerate(value):
            yield from _flatten(inner, f"{key}[{index}]")
    else:
        yield key, "null" if value is None else str(value)


def versions_table(study: Study) -> Table:
    """What the runs were made with."""
    manifests = [run.manifest for run in study.runs.values()]
    fields: dict[str, dict[str, None]] = {}
    for manifest in manifests:
        made_with = {"commit": _commit(manifest), **manifest["versions"]}
        made_with |= {f"plugin {name}": version for name, version in manifest["plugins"]}
        for name, version in made_with.items():
            fields.setdefault(name, {})[version or NONE] = None
    rows = tuple((name, ", ".join(found)) for name, found in fields.items())
    note = "" if all(len(found) == 1 for found in fields.values()) else "Not every run was made with the same versions."
    return Table("Versions", ("what", "version"), rows, note)


def _commit(manifest: Mapping[str, Any]) -> str | None:
    commit: str | None = manifest["commit"]
    return f"{commit}, changed since" if commit is not None and manifest.get("dirty") else commit


def setting(study: Study, summary: Summary) -> Iterator[tuple[str, str]]:
    """How it was measured, as pairs of a term and its explanation."""
    spec = study.example.experiment
    rollouts, evaluation = spec["rollouts"], spec["evaluation"]
    steps = evaluation.get("denoising_steps") or rollouts["denoising_steps"]
    first, seeds = summary.arms[0], ", ".join(map(str, summary.seeds))
    yield (
        "Runs",
        f"{plural(len(summary.arms), 'arm')} x {plural(len(summary.seeds), 'seed')} ({seeds}); "
        f"{spec['training_steps']} training steps of {rollouts['prompts_per_step']} prompts and "
        f"{rollouts['rollouts_per_step']} rollouts.",
    )
    yield (
        "Evaluation",
        f"{plural(summary.prompts, 'held-out prompt')}, the same in every arm and seed, one fixed start noise each, "
        f"deterministic sampler with {steps} denoising steps; base is the untouched model on the same prompts and "
        "noise.",
    )
    yield (
        "95 % CI of a gain",
        "for new seeds and new prompts: t interval on var(seed means)/S + var(prompt means)/K with Satterthwaite's "
        "degrees of freedom. It counts the residual twice and so errs on the wide side. An arm with one seed has an "
        "interval over prompts only, and is marked.",
    )
    yield (
        f"Minus {first}",
        f"difference of the gain to {first}'s, seed by seed. CI over seeds: paired t interval over new seeds on these "
        "very prompts; it decides the verdict. CI also prompts: for new seeds and new prompts, as for the gain.",
    )
    yield (
        "Detectable",
        "the true difference that this paired t test, two-sided at 5 %, would have shown with 80 % chance, from the "
        "noncentral t distribution. It takes the observed spread of the seeds for the true one, which few seeds know "
        "only roughly.",
    )
    yield ("p (Holm)", "p of the paired t test over seeds, corrected for the number of arms compared to the first.")
