"""The main job: every chosen arm under every chosen seed, here or in processes of their own, then one report."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from aegpo.commands.launch_request import OUT, LaunchRequest
from aegpo.config.loading import ExperimentFile, load_experiment_file
from aegpo.core.files import open_folder, refused, way_out
from aegpo.core.foreign import blaming, of_user
from aegpo.core.hookspecs import check_tracker
from aegpo.core.parts import TrackerSpec
from aegpo.core.processes import DISK_REFUSED, PARENT, refuse_several_processes
from aegpo.core.registries import Registries
from aegpo.core.registry import suggestion
from aegpo.core.signatures import built
from aegpo.errors import AegpoError, CheckpointError, DiskError
from aegpo.plugin.manager import distributions, load_registries, plugin_manager
from aegpo.rewards.servers import asked
from aegpo.runs.child_processes import (
    GOES_ON,
    INTERRUPTED,
    Child,
    StopSignals,
    devices_of,
    divide,
    run_children,
    usable_cores,
    usable_gpus,
)
from aegpo.runs.folders import Run, locked, run_folder, start_over, write_order
from aegpo.runs.manifest import (
    at_its_base,
    begun_threads,
    changed_batches,
    changed_versions,
    check_manifest,
    identity,
    keep_base,
    moved_places,
    note_threads,
    open_manifest,
)
from aegpo.runs.observers import Observers
from aegpo.runs.opening import Options, begun_runs
from aegpo.runs.progress import Record, display
from aegpo.runs.resuming import check_counted
from aegpo.runs.threads import allowed, fewer_threads
from aegpo.runs.trackers import JsonlTracker

if TYPE_CHECKING:
    import pluggy

    from aegpo.runs.checkpoints import Checkpoint
    from aegpo.train.engine import Engine


def launch(request: LaunchRequest) -> int:
    """Runs or resumes what was asked for and writes the report.

    One chosen run happens in this process; several happen in processes of their own, `jobs` at a time.

    Returns:
        The exit code: 0, 1 if a run failed, 130 if the user stopped.

    Raises:
        AegpoError: for a mistake in the file or the request, a run folder that cannot be gone on with, or several
            processes that were launched for it.
    """
    refuse_several_processes()
    allowed(1)  # a number of threads that is none is told before anything is written, too
    try:
        code = _launch(request, Console(), Console(stderr=True))
    except KeyboardInterrupt as error:  # before the first run, or a second Ctrl-C
        if not of_user(error):
            raise
        code = INTERRUPTED
    if code == INTERRUPTED:
        _say(Console(stderr=True), f"{GOES_ON}  {shlex.join(['aegpo', *request.command()])}")
    return code


def _launch(request: LaunchRequest, console: Console, errors: Console) -> int:
    manager = plugin_manager(request.plugins)
    registries = load_registries(manager)
    folder, runs = (_of_folder if request.of_folder else _of_file)(request, registries, errors)
    for run in runs if request.fresh else ():
        with locked(run.folder):
            start_over(run.folder)
    if len(runs) > 1:
        code = _run_apart(request, runs, console, errors)
    elif runs[0].finished:
        _say(console, f"{runs[0].label}: finished before, skipped (--fresh starts over)")
        code = 0
    else:
        code = run_here(runs[0], manager, console)
    if code != INTERRUPTED and request.report and folder is not None:
        from aegpo.report import write_report

        write_report(folder, console)
    return code


def _of_file(request: LaunchRequest, registries: Registries, errors: Console) -> tuple[Path | None, list[Run]]:
    """The experiment's folder, OUT/NAME, and the chosen runs of a file."""
    file = load_experiment_file(request.path, registries, request.overrides)
    runs = select_runs(file, request)
    if PARENT not in os.environ:  # whose log has them already
        for warning in file.warnings:
            _say(errors, f"warning: {warning}")
    for run in runs if not request.fresh else ():  # before anything is written
        check_manifest(run)
    folder = request.out / file.name
    try:
        write_order(folder, tuple(file.arms), file.seeds, file.verdict, lambda line: _say(errors, f"warning: {line}"))
    except OSError as error:
        raise AegpoError(
            f"--out {request.out}: cannot be written to: {error.strerror}; choose another folder"
        ) from error
    return folder, runs


def _of_folder(request: LaunchRequest, registries: Registries, errors: Console) -> tuple[Path | None, list[Run]]:
    """The experiment's folder, OUT/NAME, or None if runs were moved out of it; and the chosen runs that were begun."""
    for option, given in (("--set", request.overrides), ("--fresh", request.fresh), ("--out", request.out != OUT)):
        if given:
            raise AegpoError(
                f"{option}: the runs in {request.path} go on as their manifests say and where they are; leave the "
                "option out, or give the experiment file"
            )
    runs = begun_runs(request.path, registries, Options(request.arms, request.seeds))
    if PARENT not in os.environ:
        rewards = [spec for run in runs for spec in (*run.experiment.rewards, *run.experiment.evaluation.rewards)]
        for line in dict.fromkeys(asked(rewards)):
            _say(errors, f"{line}, as the manifest says")
    for run in runs:
        check_manifest(run)
    folder = runs[0].folder.resolve().parents[1]
    if all(run.folder.resolve() == folder / run.arm / f"seed-{run.seed}" for run in runs):
        return folder, runs
    if request.report:
        _say(errors, f"{request.path}: no report is written, for its runs are not at OUT/NAME/ARM/seed-S")
    return None, runs


def select_runs(file: ExperimentFile, request: LaunchRequest) -> list[Run]:
    """The chosen runs, seed by seed, so that all arms get on alike.

    Raises:
        AegpoError: for an arm or a seed the file does not have.
    """
    for arm in request.arms:
        if arm not in file.arms:
            raise AegpoError(f"{request.path} has no arm {arm!r}; {suggestion(arm, file.arms)}")
    for seed in request.seeds:
        if seed not in file.seeds:
            known = ", ".join(str(each) for each in file.seeds)
            raise AegpoError(f"{request.path} has no seed {seed}; known: {known}; add it to 'seeds' of the file")
    return [
        Run(arm, seed, file.experiment(arm, seed), run_folder(request.out, file.name, arm, seed))
        for seed in file.seeds
        for arm in file.arms
        if (not request.seeds or seed in request.seeds) and (not request.arms or arm in request.arms)
    ]


# --- one run in this process ------------------------------------------------------------------------------------------


def run_here(run: Run, manager: pluggy.PluginManager, console: Console) -> int:
    """Starts or resumes one run in this process; the exit code is 0 or 130."""
    with _room_in(run.folder), locked(run.folder), StopSignals() as stop:
        import torch

        from aegpo.runs import checkpoints
        from aegpo.runs.loop import Loop, owes_evaluation
        from aegpo.train.engine import Engine

        manifest = open_manifest(run, distributions(manager), allowed(torch.get_num_threads()))
        run = at_its_base(run, manifest)
        for line in _changes(run, manifest):
            _say(console, f"{run.label}: goes on with {line}")
        whose = identity(manifest)
        checkpoint = checkpoints.load_latest(run.checkpoints, report=lambda line: _say(console, line), run=whose)
        check_counted(run.folder, checkpoint)
        info = run.info(0 if checkpoint is None else checkpoint.step, owes_evaluation(checkpoint))
        _use_threads(run, manifest["threads"], info.first_step, console)
        observers = Observers(manager, info, lambda line: _say(console, f"{run.label}: {line}"))
        for spec in _trackers(run):
            tracker = built("tracker", spec.kind, partial(spec.build, run.folder))
            with blaming("tracker", spec.kind):
                check_tracker(spec.kind, tracker)
            observers.add(f"tracker {spec.kind!r}", tracker, spec.on_error, spec.kind == "jsonl")
        base = keep_base(run)
        engine = Engine.build(run.experiment)
        keep_base(run, base)  # which may have been downloaded, or written over, while it was loaded
        for line in engine.unused:
            _say(console, f"{run.label}: {line}")
        if checkpoint is not None:
            _take_up(engine, checkpoint, run)
        for name, part in engine.parts().items():
            observers.add(name, part)
        outcome = Loop(engine, info, observers, whose).run(stop.wanted)
        if outcome == "interrupted":
            return INTERRUPTED
        run.mark_finished(info.training_steps)
        return 0


def _changes(run: Run, manifest: Mapping[str, Any]) -> Iterator[str]:
    """What is not as it was when the run began, and may differ."""
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
        engine.load_state_dict(checkpoint.tensors, checkpoint.state)
    except CheckpointError as error:
        path = run.checkpoints / f"step-{checkpoint.step:06d}"
        raise CheckpointError(
            f"{path}: {error}; or delete it to go on from an earlier one, or start the run over with --fresh"
        ) from error


@contextmanager
def _room_in(folder: Path) -> Iterator[None]:
    """Inside, a disk that is full, or a folder that may not be written to or is taken away, is told as such."""
    try:
        yield
    except OSError as error:
        if not refused(error, folder):
            raise
        raise DiskError(
            f"{folder} cannot be written to: {error.strerror}; {way_out(error)}, then give the same command again: it "
            "goes on from the newest checkpoint"
        ) from error


def _use_threads(run: Run, begun: int, step: int, console: Console) -> None:
    """Computes with the threads the run had until `step`, or with the fewer that the environment asks for."""
    import torch

    threads = allowed(begun)
    torch.set_num_threads(threads)
    if threads != begun:
        _say(console, fewer_threads(run.label, begun, threads))
        note_threads(run, threads, step)


def _trackers(run: Run) -> Sequence[TrackerSpec]:
    """The experiment's trackers; the record is part of every run, whether the file names it or not."""
    specs = run.experiment.trackers
    records = sum(spec.kind == "jsonl" for spec in specs)
    if records > 1:
        raise AegpoError(
            f"'trackers' names 'jsonl' {records} times, which would record every step as often; name it once"
        )
    return specs if records else (*specs, JsonlTracker())


# --- several runs, each in a process of its own -----------------------------------------------------------------------


def _run_apart(request: LaunchRequest, runs: Sequence[Run], console: Console, errors: Console) -> int:
    todo = [_child(request, run) for run in runs if not run.finished]
    for child in todo:  # told once, not by each
        open_folder(child.folder)
    for child in todo:
        if child.threads is not None and allowed(child.threads) < child.threads:
            _say(errors, fewer_threads(child.label, child.threads, allowed(child.threads)))
    devices = set[str]().union(*(devices_of(run.experiment) for run in runs))
    # By the number of chosen runs, not of unfinished ones: the same command gives each run the same share.
    shares = divide(usable_cores(), usable_gpus() if devices != {"cpu"} else (), devices, request.jobs, len(runs))
    with display(console, every_step=False, runs=len(runs)) as shown:
        for run in runs:
            if run.finished:
                shown.show(run.label, Record(run.folder, run.experiment.training_steps).read())
                shown.end(run.label, "finished before, skipped (--fresh starts over)")
        failures, interrupted = run_children(todo, shares, shown)
    if failures and not interrupted and all(failure.code == DISK_REFUSED for failure in failures):
        raise DiskError(
            f"the disk refused what {len(failures)} of {len(runs)} runs wrote: {failures[0].reason or 'make room'}"
        )
    for failure in failures:
        _say(errors, f"error: {failure}")
    if interrupted:
        return INTERRUPTED
    return 1 if failures else 0


def _child(request: LaunchRequest, run: Run) -> Child:
    one = replace(request, arms=(run.arm,), seeds=(run.seed,), jobs=None, fresh=False, report=False)
    command = [sys.executable, "-m", "aegpo", *one.command()]
    steps, threads = run.experiment.training_steps, begun_threads(run)
    return Child(run.label, command, run.folder, run.log, steps, threads, lambda: run.finished)


def _say(console: Console, line: str) -> None:
    console.print(line, soft_wrap=True, markup=False, highlight=False)
