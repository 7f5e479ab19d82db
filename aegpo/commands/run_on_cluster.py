"""Runs as jobs of a cluster: submitted, followed in one display, left alone or cancelled; the same command returns."""

from __future__ import annotations

import os
import shlex
import sys
import uuid
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from aegpo.clusters import notes
from aegpo.clusters.following import Following
from aegpo.clusters.jobs import CARRIED, Job
from aegpo.clusters.settings import Value, read_settings
from aegpo.commands.launch_request import LaunchRequest
from aegpo.core.files import open_folder
from aegpo.runs.child_processes import INTERRUPTED, Child, devices_of, divide, usable_cores, usable_gpus
from aegpo.runs.folders import Run
from aegpo.runs.progress import Record, display

if TYPE_CHECKING:
    from aegpo.clusters.interface import Cluster

_SUBMITIT = "submitit"  # folder below that of the notes
_GPUS = "CUDA_VISIBLE_DEVICES"


def run_on_cluster(request: LaunchRequest, runs: Sequence[Run], console: Console, errors: Console) -> int:
    """Submits a job for each run that is not finished and has none, and follows all until they are over.

    Ctrl-C asks on a terminal whether the jobs go on; elsewhere they do.

    Returns:
        The exit code: 0, 1 if a run failed, 130 if the user left or cancelled the jobs.

    Raises:
        AegpoError: if the cluster is not there or refuses a job.
    """
    assert request.cluster is not None, "the request asks for a cluster"
    todo = [run for run in runs if not run.finished]
    children = [(run, _child(request, run)) for run in todo]
    for run in runs:
        if run not in todo:
            _say(console, f"{run.label}: finished before, skipped (--fresh starts over)")
    if not todo:
        return 0
    for run in todo:  # told once, before anything is submitted
        open_folder(run.folder)
    settings = read_settings(request.cluster, request.cluster_set)
    following = Following(request.cluster, _opened(request, notes.folder_of(todo[0]), settings), children)
    job_of = partial(_job, request, settings, _shares(request, runs, settings))
    begun = following.begin(job_of, partial(_say, console), lambda: uuid.uuid4().hex)
    with display(console, every_step=False, runs=len(runs)) as shown:
        for run in runs:
            if run not in todo:
                shown.show(run.label, Record(run.folder, run.experiment.training_steps).read())
                shown.end(run.label, "finished before")
        done = begun and following.follow(shown)
    if not done and _cancels(console):
        following.cancel()
        _say(console, "cancelled: each run saves its state after the step it is in; Ctrl-C again leaves it to them")
        with display(console, every_step=False, runs=len(runs)) as shown:
            done = following.follow(shown)
    return told(request, following, done, errors)


def told(request: LaunchRequest, following: Following, done: bool, errors: Console) -> int:
    """The exit code, and what there is to say; `done`: all jobs are over."""
    for failure in following.failures:
        _say(errors, f"error: {failure}")
    again = shlex.join(["aegpo", *request.command()])
    if not done and following.cancelled:
        left = f"{len(following.jobs)} cancelled jobs are still ending, and save their state"
        _say(errors, f"left: {left}; to go on once they are over:  {again}")
        return INTERRUPTED
    if not done:
        _say(errors, f"detached: {len(following.jobs)} jobs go on; to follow them again:  {again}")
        return INTERRUPTED
    if following.interrupted:
        _say(errors, f"interrupted; to go on:  {again}")
        return INTERRUPTED
    return 1 if following.failures else 0


def _cancels(console: Console) -> bool:
    """True if the user, who pressed Ctrl-C, wants the jobs to end."""
    if not (console.is_terminal and sys.stdin.isatty()):
        return False
    _say(console, "detach (d): the jobs go on, and the same command follows them again; or cancel (c): they end")
    try:
        return input("d or c? [d] ").strip().lower() in ("c", "cancel")
    except (EOFError, KeyboardInterrupt):
        return False


def _opened(request: LaunchRequest, folder: Path, settings: Mapping[str, Value]) -> Cluster:
    if request.cluster == "ray":
        from aegpo.clusters.with_ray import Ray

        return Ray(settings, request.size, request.gpus)
    from aegpo.clusters.with_submitit import Local, Slurm

    there = folder.resolve() / _SUBMITIT
    if request.cluster == "slurm":
        return Slurm(there, settings, request.nodes or 1, request.gpus)
    return Local(there)


def _shares(
    request: LaunchRequest, runs: Sequence[Run], settings: Mapping[str, Value]
) -> tuple[tuple[tuple[str, str], ...], ...]:
    """What jobs of this machine have of it, a share for each that runs at a time."""
    if request.cluster != "local":
        return ()
    devices = set[str]().union(*(devices_of(run.experiment) for run in runs))
    gpus = usable_gpus() if devices != {"cpu"} else ()
    jobs = settings.get("jobs")
    group = (request.size, request.gpus is not None)
    found = divide(usable_cores(), gpus, devices, None if jobs is None else int(str(jobs)), len(runs), *group)
    return tuple(tuple(share.items()) for share in found)


def _job(
    request: LaunchRequest,
    settings: Mapping[str, Value],
    shares: tuple[tuple[tuple[str, str], ...], ...],
    run: Run,
    number: str,
) -> Job:
    setup = settings.get("setup", []) if request.cluster == "local" else []  # Slurm's are lines of its script
    one = request.of_one(run.arm, run.seed)
    carried: dict[str, str | None] = {name: os.environ[name] for name in CARRIED if name in os.environ}
    if request.cluster == "local":  # submitit shows a job no GPU
        carried[_GPUS] = os.environ.get(_GPUS)
    folder = notes.folder_of(run).resolve()
    grouped = request.size > 1 and not request.over_nodes  # then its command starts its processes again itself
    return Job(
        number=number,
        words=("-m", "aegpo", *one.command()),
        directory=str(Path.cwd()),
        log=str(run.log.resolve()),
        end=str(notes.end_of(run).resolve()),
        environment=tuple(carried.items()),
        setup=tuple(setup) if isinstance(setup, list) else (),
        restarts=0 if grouped else request.restarts,
        shares=shares,
        slots=str(folder / "slots"),
        nodes=request.nodes or 1,
        processes=request.size,
        meeting=str(folder / run.arm / f"seed-{run.seed}.meeting-{number}"),
    )


def _child(request: LaunchRequest, run: Run) -> Child:
    words = [sys.executable, "-m", "aegpo", *request.of_one(run.arm, run.seed).command()]
    return Child(run.label, words, run.folder, run.log, run.experiment.training_steps)


def _say(console: Console, line: str) -> None:
    console.print(line, soft_wrap=True, markup=False, highlight=False)
