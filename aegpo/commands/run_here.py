"""One run in this process, or this process's part of a run that several compute together.

The first process of a run keeps its folder and speaks to the user; the others read what it wrote, after it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from rich.console import Console

from aegpo.core.foreign import blaming
from aegpo.core.hookspecs import check_tracker
from aegpo.core.interfaces import Stateful
from aegpo.core.parts import TrackerSpec
from aegpo.core.reports import RunInfo
from aegpo.core.signatures import built
from aegpo.errors import AegpoError, CheckpointError
from aegpo.parallel.team import Team
from aegpo.plugin.manager import distributions
from aegpo.runs import batches
from aegpo.runs.base_store import common_identity, open_store
from aegpo.runs.child_processes import INTERRUPTED, StopSignals
from aegpo.runs.cutting import Cut, keep_cut, shards_of
from aegpo.runs.folders import Run, locked, room_in
from aegpo.runs.longer import STEPS, ended_here, without_the_ending
from aegpo.runs.manifest import (
    at_its_base,
    changed_batches,
    changed_versions,
    identity,
    keep_base,
    moved_places,
    note_longer,
    note_threads,
    open_manifest,
)
from aegpo.runs.observers import Observers
from aegpo.runs.resuming import check_counted
from aegpo.runs.threads import allowed, fewer_threads
from aegpo.runs.trackers import JsonlTracker
from aegpo.runs.tracking import AccelerateTracker

if TYPE_CHECKING:
    import pluggy

    from aegpo.runs.bases import Base
    from aegpo.runs.checkpoints import Checkpoint
    from aegpo.train.engine import Engine


def run_here(run: Run, manager: pluggy.PluginManager, console: Console, team: Team) -> int:
    """Starts or resumes one run in the processes of a team; the exit code is 0 or 130.

    Args:
        run: one that is not finished.
        manager: with the plugins.
        console: for lines to the user; of another process than the first one that takes nothing.
        team: the processes, which all call this.

    Raises:
        AegpoError: if it fails; in every process.
    """
    with ExitStack() as held, team.agreed(f"{run.label}: the end"), room_in(run.folder), StopSignals() as stop:
        with room_in(run.folder):
            lock = partial(held.enter_context, locked(run.folder, stop.wanted))
            if not team.of_first(f"{run.label}: its folder is locked", lock):
                return INTERRUPTED
        return _Start(run, manager, console, team, held).go(stop)


class _Start:
    """A run that starts or goes on, in one of its processes."""

    def __init__(self, run: Run, manager: pluggy.PluginManager, console: Console, team: Team, held: ExitStack) -> None:
        self._run, self._manager, self._console, self._team, self._held = run, manager, console, team, held

    def go(self, stop: StopSignals) -> int:
        """Trains to the end, or until asked to stop."""
        import torch

        from aegpo.runs.loop import Loop, owes_evaluation
        from aegpo.train.devices import choose_device

        plugins, threads = distributions(self._manager), allowed(torch.get_num_threads())
        team = self._team
        manifest = team.of_first("the manifest", lambda: open_manifest(self._run, plugins, threads))
        run = self._run = at_its_base(self._run, manifest)
        team.use(run.experiment.parallel.timeout_minutes, choose_device(run.experiment.device, team.place))
        for line in _changes(run, manifest):
            self._say(f"goes on with {line}")
        manifest = team.of_first("its training steps", lambda: note_longer(run))
        whose = identity(manifest)
        checkpoint = self._newest(whose)
        info = run.info(0 if checkpoint is None else checkpoint.step, owes_evaluation(checkpoint))
        if team.place.attempt > 0:
            self._say(f"a process was lost; goes on from step {info.first_step} (start {team.place.attempt + 1})")
        self._use_threads(manifest["threads"], info.first_step)
        observers = self._observers(info)
        engine = self._engine(checkpoint, manifest, info)
        for name, part in engine.parts().items():
            observers.add(name, part)
            if ended_here(info) and name.startswith("reward ") and isinstance(part, Stateful):
                self._say(f"{name} has a memory, which has seen an evaluation that a longer run would not have made")
        if Loop(engine, info, observers, whose).run(stop.wanted) == "interrupted":
            return INTERRUPTED
        if team.first:
            run.mark_finished(info.training_steps)
        return 0

    def _newest(self, whose: Mapping[str, Any]) -> Checkpoint | None:
        """The newest intact checkpoint, the same for all processes."""
        from aegpo.runs import checkpoints

        folder, found, later = self._run.checkpoints, None, self._team.size > 1
        with self._team.agreed("the newest checkpoint"), room_in(self._run.folder):
            if self._team.first:
                found = checkpoints.load_latest(folder, report=self._say_alone, run=whose, later=later)
                check_counted(self._run.folder, found)
                found = self._without_the_ending(found, whose)
        step = self._team.told("its step", None if found is None else found.step)[0]
        if self._team.first or step is None:
            return found
        return checkpoints.load_step(folder, step, run=whose, later=later)

    def _without_the_ending(self, found: Checkpoint | None, whose: Mapping[str, Any]) -> Checkpoint | None:
        """The checkpoint, on disk too, without an evaluation that is none of the run's since it got more steps."""
        from aegpo.runs import checkpoints

        run = self._run
        if found is None or not ended_here(run.info(found.step, owes_evaluation=False)):
            return found
        longer = without_the_ending(found, run.folder)
        if longer is None:
            return found
        checkpoints.save(run.checkpoints, replace(longer, run=whose), run.experiment.checkpoint.keep)
        if longer.records != found.records:
            self._say(
                f"the evaluation after step {found.step}, once the last, is taken out: 'evaluation.every' is "
                f"{run.experiment.evaluation.every}, and a run that was longer from the start has none there"
            )
        return longer

    def _use_threads(self, begun: int, step: int) -> None:
        """Computes with the threads the run had until `step`, or with the fewer that the environment asks for."""
        import torch

        threads = allowed(begun)
        torch.set_num_threads(threads)
        if threads != begun and self._team.first:
            self._say_alone(fewer_threads(self._run.label, begun, threads))
            note_threads(self._run, threads, step)

    def _observers(self, info: RunInfo) -> Observers:
        """Those of the experiment, in the first process."""
        observers = Observers(self._manager, info, self._say, self._team)
        self._held.callback(observers.forget)
        with self._team.agreed("trackers are built"), room_in(self._run.folder):
            for spec in _trackers(self._run) if self._team.first else ():
                tracker = built("tracker", spec.kind, partial(spec.build, self._run.folder))
                with blaming("tracker", spec.kind):
                    check_tracker(spec.kind, tracker)
                observers.add(f"tracker {spec.kind!r}", tracker, spec.on_error, spec.kind == "jsonl")
        return observers

    def _engine(self, checkpoint: Checkpoint | None, manifest: Mapping[str, Any], info: RunInfo) -> Engine:
        """The engine, with the state of the checkpoint."""
        from aegpo.train.engine import Engine

        run, team = self._run, self._team
        begun = None if info.first_step == 0 else Cut.noted(manifest)
        team = team.cut(shards_of(run.experiment.parallel, team.size, begun))
        base = None
        with team.agreed("the base is known"), room_in(run.folder):
            if team.first:
                base = keep_base(run)
        engine = Engine.build(batches.with_noted(run.experiment, manifest), team)
        with team.agreed("the parts are built"), room_in(run.folder):
            if team.first:
                base = keep_base(run, base)  # which may have been downloaded, or written over, while it was loaded
                numbers = sum(weight.numel() for weight in engine.policy.weights.trained.values())
                sharded = engine.policy.sharding is not None
                cut = keep_cut(run, team, numbers, info.first_step, sharded)
                found = batches.note(run, engine.experiment)
                for line in (*engine.unused, *engine.policy.choices, found, cut):
                    if line is not None:
                        self._say(line)
        self._share(engine, base)
        if checkpoint is not None:
            _take_up(engine, checkpoint, run)
        return engine

    def _share(self, engine: Engine, base: Base | None) -> None:
        """Lets the engine read what other runs of the experiment measured of the same base; the first process knows."""
        plugins = distributions(self._manager)
        common = engine.team.of_first(
            "what runs have in common", lambda: common_identity(self._run, engine.policy, base, plugins)
        )
        if common is not None:
            engine.share(open_store(self._run, common, engine.team, self._say))

    def _say(self, line: str) -> None:
        self._say_alone(f"{self._run.label}: {line}")

    def _say_alone(self, line: str) -> None:
        self._console.print(line, soft_wrap=True, markup=False, highlight=False)


def _changes(run: Run, manifest: Mapping[str, Any]) -> Iterator[str]:
    """What is not as it was when the run began, and may differ."""
    if (before := manifest["experiment"][STEPS]) != run.experiment.training_steps:
        yield f"more training steps than it was to make: {before} -> {run.experiment.training_steps}"
    for change in changed_versions(manifest):
        yield f"other versions than it began with: {change}"
    for change in changed_batches(run, manifest):
        yield f"another micro-batch than it began with: {change}"
    for change in moved_places(run, manifest):
        yield f"what was moved since it began: {change}"


def _take_up(engine: Engine, checkpoint: Checkpoint, run: Run) -> None:
    """Gives the engine the state of a checkpoint.

    Raises:
        CheckpointError: if it is not of this engine.
    """
    try:
        weights, stored = engine.policy.weights.trained, checkpoint.stored
        tensors = checkpoint.tensors if stored is None else stored.read(weights=weights)
        engine.load_state_dict(tensors, checkpoint.state)
    except CheckpointError as error:
        path = run.checkpoints / f"step-{checkpoint.step:06d}"
        raise CheckpointError(
            f"{path}: {error}; or delete it to go on from an earlier one, or start the run over with --fresh"
        ) from error


def _trackers(run: Run) -> Sequence[TrackerSpec]:
    """The experiment's trackers; the record is part of every run, whether the file names it or not."""
    specs = run.experiment.trackers
    records = sum(spec.kind == "jsonl" for spec in specs)
    if records > 1:
        raise AegpoError(
            f"'trackers' names 'jsonl' {records} times, which would record every step as often; name it once"
        )
    services = [spec.log_with for spec in specs if isinstance(spec, AccelerateTracker)]
    twice = next((name for name in services if services.count(name) > 1), None)
    if twice is not None:
        raise AegpoError(f"'trackers' names 'accelerate' twice with log_with '{twice}', which keeps one run at a time")
    return specs if records else (*specs, JsonlTracker())
