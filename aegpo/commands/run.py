"""The main job: every chosen arm under every chosen seed, here or in processes of their own, then one report."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from aegpo.commands.groups import check_devices, exit_code, run_in_group, together
from aegpo.commands.launch_request import OUT, LaunchRequest
from aegpo.commands.run_here import run_here
from aegpo.commands.run_on_cluster import run_on_cluster
from aegpo.commands.telling import tell
from aegpo.config.loading import ExperimentFile, load_experiment_file
from aegpo.core.files import open_folder
from aegpo.core.foreign import of_user
from aegpo.core.processes import DISK_REFUSED, PARENT, place
from aegpo.core.registries import Registries
from aegpo.core.registry import suggestion
from aegpo.core.terminals import console
from aegpo.errors import AegpoError, DiskError, ProcessLostError
from aegpo.parallel.team import Team
from aegpo.plugin.manager import load_registries, plugin_manager
from aegpo.rewards.servers import asked
from aegpo.runs.child_processes import (
    GOES_ON,
    INTERRUPTED,
    Child,
    devices_of,
    divide,
    run_children,
    usable_cores,
    usable_gpus,
)
from aegpo.runs.folders import Run, locked, run_folder, start_over, write_order
from aegpo.runs.manifest import begun_threads, check_manifest
from aegpo.runs.opening import Options, begun_runs
from aegpo.runs.progress import Record, display
from aegpo.runs.threads import allowed, fewer_threads
from aegpo.runs.warm_server import starting

if TYPE_CHECKING:
    import pluggy


def launch(request: LaunchRequest) -> int:
    """Runs or resumes what was asked for and writes the report.

    One chosen run happens in this process, or in a group of processes; several happen in processes of their own, `jobs`
    at a time. Where a launcher such as torchrun started several processes for this command, they compute every chosen
    run together, one after another.

    Returns:
        The exit code: 0, 1 if a run failed, 130 if the user stopped.

    Raises:
        AegpoError: for a mistake in the file or the request, or a run folder that cannot be gone on with.
        ProcessLostError: if a process of a run was lost, and is not to be started again.
    """
    request.check()
    allowed(1)  # a number of threads that is none is told before anything is written, too
    try:
        code = _launch(request)
    except KeyboardInterrupt as error:  # before the first run, or a second Ctrl-C
        if not of_user(error):
            raise
        code = INTERRUPTED
    if code == INTERRUPTED and place().rank == 0 and request.cluster is None:
        _say(Console(stderr=True), f"{GOES_ON}  {shlex.join(['aegpo', *request.command()])}")
    return code


def in_group(request: LaunchRequest) -> int:
    """What `launch` starts in each process of a group."""
    return exit_code(lambda: _launch(request))


def _launch(request: LaunchRequest) -> int:
    with together() as team:
        if team.size > 1 and (request.apart or request.cluster is not None):
            raise AegpoError(
                "--processes, --gpus, --max-restarts and --cluster are for a command that starts its processes itself; "
                "leave them out under torchrun or another launcher"
            )
        return _run(request, team, console(quiet=not team.first), Console(stderr=True, quiet=not team.first))


def _run(request: LaunchRequest, team: Team, console: Console, errors: Console) -> int:
    manager = plugin_manager(request.plugins)
    registries = load_registries(manager)
    folder, runs = (_of_folder if request.of_folder else _of_file)(request, team, registries, errors)
    check_devices([run.experiment for run in runs], request, max(team.size, request.size))
    with team.agreed("runs start over"):
        # Where a launcher has started the processes again, what they did is kept.
        if request.fresh and team.first and not team.place.attempt:
            begin_anew(runs)
    finished = team.of_first("what is finished", lambda: [run.finished for run in runs])
    todo = [run for run, done in zip(runs, finished, strict=True) if not done]
    if request.cluster is not None:
        code = run_on_cluster(request, runs, console, errors)
    elif len(runs) > 1 and team.size == 1:
        code = _run_apart(request, runs, console, errors)
    else:
        for run in runs:
            if run not in todo:
                _say(console, f"{run.label}: finished before, skipped (--fresh starts over)")
        if todo and request.apart:
            code = run_in_group(request, todo[0], in_group)
        else:
            code = one_after_another(todo, len(runs), manager, console, team)
    if code != INTERRUPTED and request.report and folder is not None:
        with team.agreed("the report is written"):
            if team.first:
                from aegpo.report import write_report

                write_report(folder, console)
    return code


def begin_anew(runs: Sequence[Run]) -> None:
    """Deletes what runs have done."""
    for run in runs:
        with locked(run.folder):
            start_over(run.folder)


def one_after_another(
    runs: Sequence[Run], chosen: int, manager: pluggy.PluginManager, console: Console, team: Team
) -> int:
    """Runs in this process; of several chosen ones a failing one does not stop the others."""
    failed = False
    for run in runs:
        try:
            if run_here(run, manager, console, team) == INTERRUPTED:
                return INTERRUPTED
        except ProcessLostError:
            raise
        except AegpoError as error:
            if chosen == 1:
                raise
            failed = True
            tell(error, f"{run.label} failed: ")
    return 1 if failed else 0


def _of_file(
    request: LaunchRequest, team: Team, registries: Registries, errors: Console
) -> tuple[Path | None, list[Run]]:
    """The experiment's folder, OUT/NAME, and the chosen runs of a file."""
    return open_file(load_experiment_file(request.path, registries, request.overrides), request, team, errors)


def open_file(file: ExperimentFile, request: LaunchRequest, team: Team, errors: Console) -> tuple[Path, list[Run]]:
    """The experiment's folder, where the order of its runs is written, and the chosen runs.

    Raises:
        AegpoError: if one of them cannot be begun or gone on with in the folder.
    """
    runs = select_runs(file, request)
    if PARENT not in os.environ:  # whose log has them already
        for warning in file.warnings:
            _say(errors, f"warning: {warning}")
    for run in runs if not request.fresh else ():  # before anything is written
        check_manifest(run)
    folder, order = request.out / file.name, (tuple(file.arms), file.seeds, file.verdict)
    about = {arm: experiment.about for arm, experiment in file.arms.items() if experiment.about is not None}
    with team.agreed("the order of runs is written"):
        try:
            if team.first:
                write_order(folder, *order, lambda line: _say(errors, f"warning: {line}"), about)
        except OSError as error:
            raise AegpoError(
                f"--out {request.out}: cannot be written to: {error.strerror}; choose another folder"
            ) from error
    return folder, runs


def _of_folder(
    request: LaunchRequest, team: Team, registries: Registries, errors: Console
) -> tuple[Path | None, list[Run]]:
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
    gpus = usable_gpus() if devices != {"cpu"} else ()
    group = (request.size, request.gpus is not None)
    shares = divide(usable_cores(), gpus, devices, request.jobs, len(runs), *group)
    start = nullcontext() if gpus or request.apart else starting(len(todo), shares)
    with display(console, every_step=False, runs=len(runs)) as shown, start as starter:
        for run in runs:
            if run.finished:
                shown.show(run.label, Record(run.folder, run.experiment.training_steps).read())
                shown.end(run.label, "finished before, skipped (--fresh starts over)")
        failures, interrupted = run_children(todo, shares, shown, starter)
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
    command = [sys.executable, "-m", "aegpo", *request.of_one(run.arm, run.seed).command()]
    steps, threads = run.experiment.training_steps, begun_threads(run)
    return Child(run.label, command, run.folder, run.log, steps, threads, lambda: run.finished)


def _say(console: Console, line: str) -> None:
    console.print(line, soft_wrap=True, markup=False, highlight=False)
