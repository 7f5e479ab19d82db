"""The tables of the report as text, for the terminal and the page alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from aegpo.method.costs import BACKWARD
from aegpo.report.contrasts import MARGIN_SHARE, Contrast
from aegpo.report.reaching import TARGET_SHARE
from aegpo.report.recorded import Study
from aegpo.report.scores import Score
from aegpo.report.summary import Summary
from aegpo.report.wording import NOT_POSSIBLE, chance, count, interval, label_decimals, plural, signed, spent

NONE = "-"
_ARMS_ACROSS = 7  # columns of arms in a table
_OPTIONAL = {"of these signals": "0"}  # column -> the cell that says nothing where all rows have it
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
    """Two tables for each evaluation label: what every arm gained, and the differences that are compared."""
    for label in summary.labels:
        rows = summary.under(label)
        role = "trained" if rows[0].trained else "guard: scored, never optimised"
        if len({row.trained for row in rows}) > 1:
            role = "trained in some arms: " + ", ".join(row.arm for row in rows if row.trained)
        contrasts, places = summary.compared(label), label_decimals(summary, label)
        yield _gains(f"{label} ({role})", rows, places)
        if contrasts:
            yield _differences(f"{label}: differences", contrasts, places)
        if label == summary.headline:
            yield from _at_equal_cost(summary, label, places)


def equal_cost_tables(summary: Summary) -> Iterator[Table]:
    """The same at equal cost, for every label but the headline, whose tables `score_tables` has."""
    for label in summary.labels:
        if label != summary.headline:
            yield from _at_equal_cost(summary, label, label_decimals(summary, label))


def _at_equal_cost(summary: Summary, label: str, places: int) -> Iterator[Table]:
    equal = summary.equal_cost
    if equal is None or not equal.under(label):
        return
    where = f"{label} at equal cost, {count(equal.cost)}"
    yield _gains(f"{where}: all that {equal.arm} spends", equal.under(label), places)
    if equal.compared(label):
        yield _differences(f"{where}: differences", equal.compared(label), places)


def _gains(title: str, rows: Sequence[Score], places: int) -> Table:
    # one seed says nothing about other seeds, so its interval is marked
    marks = [" (prompts only)" if len(row.seeds) < 2 else "" for row in rows]
    cells = tuple(
        (
            row.arm,
            str(len(row.seeds)),
            f"{row.base:.{places}f}",
            f"{row.final:.{places}f}",
            signed(row.gain, places),
            interval(row.gain_interval, places) + mark,
        )
        for row, mark in zip(rows, marks, strict=True)
    )
    return Table(title, ("arm", "seeds", "base", "final", "gain", "95 % CI"), cells)


def _differences(title: str, contrasts: Sequence[Contrast], places: int) -> Table:
    columns = ("arm", "minus", "seeds", "difference", "CI over seeds", "CI also prompts", "p (Holm)")
    cells = tuple(
        (
            each.arm,
            each.reference,
            str(len(each.seeds)),
            signed(each.mean, places),
            interval(each.over_seeds, places),
            interval(each.over_both, places),
            chance(each.p_holm),
            chance(each.p_equal_holm, NONE if each.p is not None else NOT_POSSIBLE),
            NONE if each.margin is None or each.p is None else f"{each.margin:.{places}f}",
            NOT_POSSIBLE if each.smallest_detectable is None else f"{each.smallest_detectable:.{places}f}",
        )
        for each in contrasts
    )
    seeds = min((len(each.seeds) for each in contrasts), default=0)
    note = "" if any(each.p is not None for each in contrasts) else f"With {plural(seeds, 'seed')} nothing is tested."
    return _lean(Table(title, (*columns, "p equal", "margin", "detectable"), cells, note))


def _lean(table: Table) -> Table:
    """The table without columns in which no row has a value."""
    kept = [
        index
        for index, name in enumerate(table.columns)
        if index == 0 or not {row[index] for row in table.rows} <= {NOT_POSSIBLE, NONE, _OPTIONAL.get(name, NONE)}
    ]
    columns = tuple(table.columns[index] for index in kept)
    return replace(table, columns=columns, rows=tuple(tuple(row[index] for index in kept) for row in table.rows))


def cost_table(summary: Summary) -> Table:
    """What every arm spent, mean over its finished seeds."""
    columns = (
        "arm",
        "steps",
        "forwards",
        "of these signals",
        "gradient rows",
        "cost",
        "relative",
        "s per step",
        "s in all",
    )
    places = label_decimals(summary, summary.headline)
    rows = tuple(
        (
            cost.arm,
            str(cost.steps),
            count(cost.forwards),
            count(cost.signal_forwards),
            count(cost.gradient_rows),
            count(cost.cost),
            NONE if cost.relative_cost is None else f"{cost.relative_cost:.2f} x",
            f"{cost.training_seconds / cost.steps:.2f}",
            count(cost.total_seconds),
            NONE if cost.gain_at_equal_cost is None else signed(cost.gain_at_equal_cost, places),
        )
        for cost in summary.costs
    )
    note = (
        f"Cost = forwards + {BACKWARD} x gradient rows, and 1 more for each frozen policy at a state that is learned "
        "from. Gradient rows are states, each once in every optimizer step that learns from it. "
        "Seconds per step are without evaluations and checkpoints."
    )
    if summary.equal_cost is not None:
        note += f" Gain at equal cost: gain on {summary.headline} with all spent that the cheapest run spends in all."
    return _lean(Table("What it cost", (*columns, "gain at equal cost"), rows, note))


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


def reach_tables(summary: Summary) -> Iterator[Table]:
    """What every arm spent until it reached the target; nothing where no arm gained anything."""
    target = summary.target
    if target is None:
        return
    score = f"{target.score:.{label_decimals(summary, summary.headline)}f}"
    share = "" if target.share_of is None else f", {100 * TARGET_SHARE:.0f} % of {target.share_of}'s gain"
    columns = ("steps", "cost", "seconds", "forwards")
    rows = tuple(
        (each.arm, f"{each.reached} of {len(each.seeds)}", *(spent(each.spent[axis]) for axis in columns))
        for each in summary.reach
    )
    note = (
        "The first crossing of each seed's own curve, straight between evaluations; geometric mean over seeds with its "
        "95 % CI for new seeds, in the spread of the logarithms of all arms whose every seed reached it. A seed that "
        "did not counts with all it spent, so that only the low end of the interval is known. Seconds are of training."
    )
    yield Table(f"To reach {summary.headline} {score}{share}", ("arm", "reached", *columns), rows, note)


def difference_tables(study: Study) -> Iterator[Table]:
    """Fields of the resolved spec in which arms differ; so many arms a table as paper is wide."""
    whole = _difference_table(study)
    for start in range(1, len(whole.columns), _ARMS_ACROSS) if whole.rows else ():
        kept = slice(start, start + _ARMS_ACROSS)
        rows = tuple((row[0], *row[kept]) for row in whole.rows)
        yield replace(whole, columns=(whole.columns[0], *whole.columns[kept]), rows=rows)


def _difference_table(study: Study) -> Table:
    arms = [arm for arm in study.arms if study.of(arm)]
    fields = {arm: dict(_flatten(study.of(arm)[0].experiment)) for arm in arms}
    keys = dict.fromkeys(key for arm in arms for key in fields[arm])
    rows = tuple(
        (key, *(fields[arm].get(key, NONE) for arm in arms))
        for key in keys
        if key not in ("seed", "name", "about") and len({fields[arm].get(key) for arm in arms}) > 1
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
    images = evaluation.get("images_per_prompt", 1)  # which manifests of 0.1 lack
    noise = "one fixed start noise each" if images == 1 else f"{images} fixed start noises each, scores averaged"
    seeds = ", ".join(map(str, summary.seeds))
    yield (
        "Runs",
        f"{plural(len(summary.arms), 'arm')} x {plural(len(summary.seeds), 'seed')} ({seeds}); "
        f"{spec['training_steps']} training steps of {rollouts['prompts_per_step']} prompts and "
        f"{rollouts['rollouts_per_step']} rollouts.",
    )
    yield (
        "Evaluation",
        f"{plural(summary.prompts, 'held-out prompt')}, the same in every arm and seed, {noise}, "
        f"deterministic sampler with {steps} denoising steps; base is the untouched model on the same prompts and "
        "noise.",
    )
    yield from _judgement(summary)


def _judgement(summary: Summary) -> Iterator[tuple[str, str]]:
    """What intervals, tests and margins are."""
    yield (
        "95 % CI of a gain",
        "for new seeds and new prompts. Errors of seeds and of prompts are added as sqrt(sum of t^2 variance), each t "
        "for its own degrees of freedom (Banerjee 1960): it covers 95 % or more, and is never narrower than over seeds "
        "alone. An arm with one seed has an interval over prompts only, and is marked.",
    )
    yield (
        "Spread of seeds",
        "pooled over arms, (arms - 1) x (seeds - 1) degrees of freedom, by the analysis of variance of arms crossed "
        "with seeds. It assumes that seeds spread alike in every arm; the verdict says where one arm seems to vary "
        "more than the others.",
    )
    yield (
        "Differences",
        "of gains, seed by seed, of the pairs that the file names in 'comparisons', or of every arm to the first. CI "
        "over seeds: t interval for new seeds on these very prompts; it decides the verdict. CI also prompts: for new "
        "seeds and new prompts. p (Holm): of no difference, corrected for the number of differences under the label; "
        "those at equal cost count among them.",
    )
    yield (
        "p equal",
        "of the difference being as large as the margin or larger: two one-sided t tests (TOST), corrected in the same "
        f"way. Below 0.05, the two are equal but for less than the margin. {_margin(summary)}",
    )
    yield (
        "Detectable",
        "the true difference that this t test, two-sided at 5 % and not corrected, would have shown with 80 % chance, "
        "from the noncentral t distribution and the pooled spread.",
    )


def _margin(summary: Summary) -> str:
    part = f"{100 * MARGIN_SHARE:.0f} % of the reference's gain"
    share = f"{part}, if it has any; the test allows for its being an estimate"
    if summary.margin is None:
        return f"The margin is {share}; 'margin' in the file sets another."
    return f"The margin is {summary.margin:g} on {summary.headline}, as the file says; elsewhere it is {share}."
