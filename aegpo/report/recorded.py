"""Reads back what the runs of an experiment left on disk, and says what is missing."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from aegpo.core.registry import suggestion
from aegpo.core.verdicts import VerdictSpec
from aegpo.errors import AegpoError, CheckpointError
from aegpo.report.merging import check_one_experiment, merged_order
from aegpo.report.recorded_run import RecordedRun, read_run
from aegpo.runs.bases import told
from aegpo.runs.evaluations import evaluated_steps, unevaluated
from aegpo.runs.folders import ORDER, Order, read_order
from aegpo.runs.observers import read_dropped
from aegpo.runs.resuming import METRICS

_SHOWN = 5  # steps that a note names


@dataclass(frozen=True)
class Study:
    """Every run of one experiment; the first arm is the baseline."""

    folder: Path
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    runs: Mapping[tuple[str, int], RecordedRun]
    notes: tuple[str, ...]  # what is missing or odd, in words
    verdict: VerdictSpec  # which arms are compared, and by what measure
    noted: Mapping[str, str]  # what arms do, as the file says now

    @property
    def name(self) -> str:
        """The experiment's name."""
        return self.folder.name

    def of(self, arm: str) -> tuple[RecordedRun, ...]:
        """The runs of an arm that have begun, by seed."""
        return tuple(self.runs[arm, seed] for seed in self.seeds if (arm, seed) in self.runs)

    def finished(self, arm: str) -> tuple[RecordedRun, ...]:
        """The finished runs of an arm, by seed."""
        return tuple(run for run in self.of(arm) if run.finished)

    @cached_property
    def about(self) -> Mapping[str, str]:
        """What arms do, by arm: as the file says now, else as it did when the first run was begun."""
        begun = {arm: self.of(arm)[0].experiment.get("about") for arm in self.arms if self.of(arm)}
        told = {arm: self.noted.get(arm) or begun.get(arm) for arm in self.arms}
        return {arm: words for arm, words in told.items() if words}

    @cached_property
    def example(self) -> RecordedRun:
        """The first run in the order of the arms: what is said of all runs is read off it."""
        return next(run for arm in self.arms for run in self.of(arm))

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """Evaluation labels: what the first arm optimises first, then the guards."""
        rows = (row for run in self.runs.values() for row in run.evaluations)
        evaluated = dict.fromkeys(label for row in rows for label in row.scores)
        trained = [label for label in self.example.trained if label in evaluated]
        return (*trained, *(label for label in evaluated if label not in trained))


def read_study(folder: Path, *more: Path) -> Study:
    """Reads every `ARM/seed-S` below the folder of an experiment; runs that cannot be read are left out, and named.

    Args:
        folder: the experiment's.
        more: others with runs of the same experiment.

    Raises:
        AegpoError: if there is no run, none can be read, runs were evaluated on different prompts, or the folders do
            not fit together.
    """
    found: dict[tuple[str, int], Path] = {}
    orders, unordered = dict[Path, Order](), list[str]()
    for each in (folder, *more):
        there = {(path.parent.name, _seed(path)): path for path in sorted(each.glob("*/seed-*")) if _seed(path) >= 0}
        begun = {key: path for key, path in there.items() if (path / "manifest.json").exists()}
        if not begun:
            raise AegpoError(f"no run in {each}: it has no ARM/seed-S/manifest.json; name a folder a run wrote to")
        for arm, seed in begun.keys() & found.keys():
            raise AegpoError(
                f"seed {seed} of arm {arm} is in {found[arm, seed].parents[1]} and in {each}; a report takes each run "
                "once: leave out one of the folders, or move one of the two runs away"
            )
        found |= there
        orders[each], notes = _order(each, begun)
        unordered += notes
    begun = {key: path for key, path in found.items() if (path / "manifest.json").exists()}
    order = merged_order(orders)
    arms, seeds = order.arms, order.seeds
    runs, unread = dict[tuple[str, int], RecordedRun](), dict[tuple[str, int], str]()
    for (arm, seed), path in begun.items():
        if arm in arms and seed in seeds:
            try:
                runs[arm, seed] = read_run(arm, seed, path)
            except CheckpointError as error:
                unread[arm, seed] = f"seed {seed} of arm {arm}: left out of all tables: {error}"
    for (arm, seed), path in found.items():
        if (arm, seed) not in begun and arm in arms and seed in seeds and (path / METRICS).exists():
            unread[arm, seed] = (
                f"seed {seed} of arm {arm}: left out of all tables: {path / 'manifest.json'} is gone; put it back"
            )
    if unread and not runs:
        raise AegpoError("no run can be read:\n" + "\n".join(f"  {line}" for line in unread.values()))
    if not runs:
        raise AegpoError(f"no run in {folder} is of the arms and seeds that its order.json names")
    if more:
        check_one_experiment(list(runs.values()))
    others = dict(_other_bases(arms, seeds, runs))
    unread |= others
    runs = {key: run for key, run in runs.items() if key not in others}
    _check_prompts(runs)
    lost = (*unordered, *unread.values(), *(line for run in runs.values() for line in run.damage))
    odd = (*_unevaluated(runs), *_dropped(runs), *_not_finite(runs))
    notes = (*lost, *_missing(arms, seeds, runs, unread), *odd, *_strangers(begun, {*runs, *unread}))
    return Study(folder, arms, seeds, runs, notes, order.verdict, order.about)


def compared_to(study: Study, reference: str) -> Study:
    """A study in which every arm is compared to this one, which comes first; controls stay.

    Raises:
        AegpoError: if there is no such arm.
    """
    if reference not in study.arms:
        raise AegpoError(f"--reference: no arm is called {reference!r}; {suggestion(reference, study.arms)}")
    arms = (reference, *(arm for arm in study.arms if arm != reference))
    controls = {arm: control for arm, control in (study.verdict.controls or {}).items() if arm != reference}
    verdict = study.verdict.model_copy(update={"comparisons": None, "controls": controls or None})
    return replace(study, arms=arms, verdict=verdict)


def _seed(path: Path) -> int:
    number = path.name.removeprefix("seed-")
    return int(number) if number.isdecimal() else -1


def _order(folder: Path, begun: Mapping[tuple[str, int], Path]) -> tuple[Order, tuple[str, ...]]:
    """Arms and seeds in their order, and why that is not the experiment's own."""
    every = Order(tuple(sorted({arm for arm, _ in begun})), tuple(sorted({seed for _, seed in begun})))
    if not (folder / ORDER).exists():
        return every, ()
    try:
        order = read_order(folder)
    except CheckpointError as error:
        note = f"the order of the arms is lost, so they are in alphabetical order and compared to the first: {error}"
        return every, (note,)
    return order, ()


def _other_bases(
    arms: Sequence[str], seeds: Sequence[int], runs: Mapping[tuple[str, int], RecordedRun]
) -> Iterator[tuple[tuple[str, int], str]]:
    """Runs that were trained from another base than the first arm's, and what a note says of each.

    What was learned from another base says nothing about the method. Runs that 0.1 began do not say what theirs was.
    """
    ordered = [runs[arm, seed] for arm in arms for seed in seeds if (arm, seed) in runs]
    noted = [run for run in ordered if run.manifest.get("base") is not None]
    for run in noted:
        if run.manifest["base"] != noted[0].manifest["base"]:
            base, first = (told(each.manifest["base"]) for each in (run, noted[0]))
            yield (
                (run.arm, run.seed),
                f"seed {run.seed} of arm {run.arm}: left out of all tables: it was trained from another base ({base}) "
                f"than seed {noted[0].seed} of arm {noted[0].arm} ({first}), so they cannot be compared; run it again "
                "with --fresh and the same weights",
            )


def _check_prompts(runs: Mapping[tuple[str, int], RecordedRun]) -> None:
    first: tuple[str, tuple[str, ...]] | None = None
    for (arm, seed), run in runs.items():
        for row in run.evaluations:
            first = first or (f"{arm} seed {seed}", row.prompts)
            if row.prompts != first[1]:
                raise AegpoError(
                    f"{arm} seed {seed} was evaluated at step {row.step} on other prompts than {first[0]}, so their "
                    "scores cannot be compared; give every arm the same 'prompts' and run them again with --fresh"
                )


def _missing(
    arms: Sequence[str], seeds: Sequence[int], runs: Mapping[tuple[str, int], RecordedRun], unread: Container[object]
) -> Iterator[str]:
    for arm in arms:
        for seed in seeds:
            run = runs.get((arm, seed))
            if (arm, seed) in unread:
                continue
            if run is None:
                yield f"seed {seed} of arm {arm}: not started"
            elif not run.finished:
                end = "" if run.steps_done < run.training_steps else ", not marked finished or last step not evaluated"
                yield f"seed {seed} of arm {arm}: {run.steps_done} of {run.training_steps} steps{end}"
            elif missing := [row.step for row in run.steps if row.step not in run.seconds]:
                yield f"seed {seed} of arm {arm}: no wall-clock was recorded for {len(missing)} of its steps"


def _unevaluated(runs: Mapping[tuple[str, int], RecordedRun]) -> Iterator[str]:
    for (arm, seed), run in runs.items():
        due = evaluated_steps(run.training_steps, int(run.experiment["evaluation"]["every"]))
        lost = unevaluated([row.step for row in run.evaluations], due, run.steps_done)
        if lost and (run.evaluations or run.steps):  # else it has only begun
            yield f"seed {seed} of arm {arm}: evaluations.jsonl lacks {lost}; the arm's curve has nothing there"


def _dropped(runs: Mapping[tuple[str, int], RecordedRun]) -> Iterator[str]:
    """What trackers and plugins did not hear to the end."""
    for (arm, seed), run in runs.items():
        try:
            dropped = read_dropped(run.folder)
        except CheckpointError as error:
            yield f"seed {seed} of arm {arm}: {error}: who was left out is not known"
            continue
        for each in dropped:
            where = f"seed {seed} of arm {arm}, step {each.step}"
            yield f"{where}: {each.observer} failed with {each.error}, and the run went on without it"


def _not_finite(runs: Mapping[tuple[str, int], RecordedRun]) -> Iterator[str]:
    for (arm, seed), run in runs.items():
        for what, steps in sorted(run.not_finite.items()):
            shown = [str(step) for step in steps[:_SHOWN]]
            shown += [f"{len(steps) - _SHOWN} more"] if len(steps) > _SHOWN else []
            where = f"step{'s' * (len(steps) > 1)} {', '.join(shown)}"
            yield f"seed {seed} of arm {arm}: {what} is not a finite number at {where}, and left out there"


def _strangers(begun: Mapping[tuple[str, int], Path], known: Container[object]) -> Iterator[str]:
    for arm, seed in begun:
        if (arm, seed) not in known:
            yield f"seed {seed} of arm {arm} is in the folder but not in the experiment: left out"
