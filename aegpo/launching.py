"""The main job: every chosen arm under every chosen seed, here or in processes of their own, then one report."""

from __future__ import annotations

import errno
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from rich.console import Console

from aegpo.errors import AegpoError
from aegpo.hookspecs import Outcome
from aegpo.interfaces import RunInfo
from aegpo.loading import ExperimentFile, load_experiment_file
from aegpo.plugins import distributions, load_registries, plugin_manager
from aegpo.progress import Display, Record, display
from aegpo.registry import suggestion
from aegpo.runs import (
    Run,
    changed_batches,
    changed_versions,
    check_manifest,
    locked,
    open_manifest,
    run_folder,
    start_over,
    write_order,
)
from aegpo.specs import TrackerSpec
from aegpo.trackers import JsonlTracker

if TYPE_CHECKING:
    import pluggy

INTERRUPTED = 130  # exit code of a run that Ctrl-C or SIGTERM stopped, as shells have it
_PARENT = "AEGPO_PARENT"  # environment variable that tells a child which process waits for it
_LOOK_EVERY = 0.5  # seconds between looks at the children
_LOG_LINES = 15
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


@dataclass(frozen=True)
class LaunchRequest:
    """What the command line asked for."""

    path: Path
    overrides: tuple[str, ...] = ()  # key=value
    plugins: tuple[str, ...] = ()
    arms: tuple[str, ...] = ()  # empty: every arm of the file
    seeds: tuple[int, ...] = ()  # empty: every seed of the file
    out: Path = Path("runs")
    jobs: int | None = None  # runs at a time; None: one for each GPU, or for each core
    fresh: bool = False
    report: bool = True

    def command(self) -> list[str]:
        """The command line that goes on with this request (never `--fresh`: that would throw away what is done)."""
        words = ["run", str(self.path)]
        words += [word for arm in self.arms for word in ("--arm", arm)]
        words += [word for seed in self.seeds for word in ("--seed", str(seed))]
        words += [word for override in self.overrides for word in ("--set", override)]
        words += [word for plugin in self.plugins for word in ("--plugin", plugin)]
        words += ["--out", str(self.out)]
        words += [] if self.jobs is None else ["--jobs", str(self.jobs)]
        return words if self.report else [*words, "--no-report"]


def launch(request: LaunchRequest) -> int:
    """Runs or resumes what was asked for and writes the report.

    One chosen run happens in this process; several happen in processes of their own, `jobs` at a time.

    Returns:
        The exit code: 0, 1 if a run failed, 130 if the user stopped.

    Raises:
        AegpoError: for a mistake in the file or the request, or a run folder that cannot be gone on with.
    """
    try:
        code = _launch(request, Console(), Console(stderr=True))
    except KeyboardInterrupt:  # before the first run, or a second Ctrl-C
        code = INTERRUPTED
    if code == INTERRUPTED:
        _say(Console(stderr=True), f"interrupted; to go on:  {shlex.join(['aegpo', *request.command()])}")
    return code


def _launch(request: LaunchRequest, console: Console, errors: Console) -> int:
    manager = plugin_manager(request.plugins)
    file = load_experiment_file(request.path, load_registries(manager), request.overrides)
    runs = select_runs(file, request)
    if _PARENT not in os.environ:  # whose log has them already
        for warning in file.warnings:
            _say(errors, f"warning: {warning}")
    try:
        write_order(request.out / file.name, tuple(file.arms), file.seeds)
    except OSError as error:
        raise AegpoError(
            f"--out {request.out}: cannot be written to: {error.strerror}; choose another folder"
        ) from error
    for run in runs:
        if request.fresh:
            with locked(run.folder):
                start_over(run.folder)
        else:
            check_manifest(run)
    if len(runs) > 1:
        code = _run_apart(request, runs, console, errors)
    elif runs[0].finished:
        _say(console, f"{runs[0].label}: finished before, skipped (--fresh starts over)")
        code = 0
    else:
        code = run_here(runs[0], manager, console)
    if code != INTERRUPTED and request.report:
        from aegpo.report import write_report

        write_report(request.out / file.name, console)
    return code


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
    with locked(run.folder), StopSignals() as stop:
        import torch

        from aegpo import checkpoints
        from aegpo.engine import Engine

        manifest = open_manifest(run, distributions(manager), torch.get_num_threads())
        for change in changed_versions(manifest):
            _say(console, f"{run.label}: goes on with other versions than it began with: {change}")
        for change in changed_batches(run, manifest):
            _say(console, f"{run.label}: goes on with another micro-batch than it began with: {change}")
        torch.set_num_threads(manifest["threads"])
        checkpoint = checkpoints.load_latest(run.checkpoints, report=lambda line: _say(console, line))
        for index, spec in enumerate(_trackers(run)):
            manager.register(spec.build(run.folder), name=f"tracker/{index}-{spec.kind}")
        first_step = 0 if checkpoint is None else checkpoint.step
        info = RunInfo(run.arm, run.seed, run.folder, first_step, run.experiment.training_steps)
        try:
            engine = Engine.build(run.experiment, manager)
            if checkpoint is not None:
                engine.restore(checkpoint)
            outcome = engine.run(info, stop.wanted)
        except BaseException as error:
            how: Outcome = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            manager.hook.aegpo_on_run_end(run=info, outcome=how)
            if isinstance(error, OSError) and error.errno in _NO_ROOM:
                raise AegpoError(
                    f"{run.folder} cannot be written to: {error.strerror}; make room, then give the same command "
                    "again: it goes on from the newest checkpoint"
                ) from error
            raise
        if outcome == "interrupted":
            return INTERRUPTED
        run.mark_finished(info.training_steps)
        return 0


def _trackers(run: Run) -> Sequence[TrackerSpec]:
    """The experiment's trackers; the record is part of every run, whether the file names it or not."""
    specs = run.experiment.trackers
    records = sum(spec.kind == "jsonl" for spec in specs)
    if records > 1:
        raise AegpoError(
            f"'trackers' names 'jsonl' {records} times, which would record every step as often; name it once"
        )
    return specs if records else (*specs, JsonlTracker())


class StopSignals:
    """Within this context the first Ctrl-C or SIGTERM asks to stop, and the second one stops at once."""

    def __init__(self) -> None:
        self.count = 0
        self._parent = int(os.environ.get(_PARENT, 0))
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def wanted(self) -> bool:
        """True once a signal came, or the process that waits for this one is gone."""
        return self.count > 0 or (self._parent != 0 and os.getppid() != self._parent)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        if self.count > 1:
            raise KeyboardInterrupt


# --- several runs, each in a process of its own -----------------------------------------------------------------------


@dataclass(frozen=True)
class Child:
    """A run in a process of its own."""

    label: str
    command: Sequence[str]
    folder: Path  # where its record grows
    log: Path
    steps: int


@dataclass(frozen=True)
class Failure:
    """A child that ended badly."""

    child: Child
    code: int

    def __str__(self) -> str:
        how = f"exit code {self.code}" if self.code >= 0 else f"killed by {signal.Signals(-self.code).name}"
        lines = self.child.log.read_text(errors="replace").splitlines()[-_LOG_LINES:]
        tail = "\n".join(f"  | {line}" for line in lines)
        return f"{self.child.label} failed: {how}; the end of {self.child.log}:\n{tail}"


def _run_apart(request: LaunchRequest, runs: Sequence[Run], console: Console, errors: Console) -> int:
    todo = [_child(request, run) for run in runs if not run.finished]
    devices = {run.experiment.device for run in runs}
    # By the number of chosen runs, not of unfinished ones: the same command gives each run the same share.
    shares = divide(usable_cores(), usable_gpus() if devices != {"cpu"} else (), devices, request.jobs, len(runs))
    with display(console, every_step=False, runs=len(runs)) as shown:
        for run in runs:
            if run.finished:
                shown.show(run.label, Record(run.folder, run.experiment.training_steps).read())
                shown.end(run.label, "finished before, skipped (--fresh starts over)")
        failures, interrupted = run_children(todo, shares, shown)
    for failure in failures:
        _say(errors, f"error: {failure}")
    if interrupted:
        return INTERRUPTED
    return 1 if failures else 0


def _child(request: LaunchRequest, run: Run) -> Child:
    one = replace(request, arms=(run.arm,), seeds=(run.seed,), jobs=None, fresh=False, report=False)
    command = [sys.executable, "-m", "aegpo", *one.command()]
    return Child(run.label, command, run.folder, run.log, run.experiment.training_steps)


def run_children(
    children: Sequence[Child], shares: Sequence[Mapping[str, str]], shown: Display
) -> tuple[list[Failure], bool]:
    """Runs every child, in this order, one at a time in each slot; a failing one does not stop the others.

    Ctrl-C tells the children that run to stop and waits for them; a second one kills them.

    Args:
        children: what to run.
        shares: for each slot, the environment variables of its share of the machine.
        shown: where progress goes.

    Returns:
        The failures in the order they happened, and whether any child was stopped before it was done.
    """
    waiting, working = deque(children), dict[int, _Working]()
    failures: list[Failure] = []
    interrupted = told = False
    with StopSignals() as stop, _killed_on_error(working):
        while working or (waiting and not told):
            for slot, share in enumerate(shares):
                if slot not in working and waiting and not told:
                    working[slot] = _Working(waiting.popleft(), share, shown)
            for slot, each in list(working.items()):
                code = each.look(told)
                if code is not None:
                    del working[slot]
                    interrupted |= code == INTERRUPTED
                    failures += [Failure(each.child, code)] if code not in (0, INTERRUPTED) else []
            if stop.wanted() and not told:
                told = interrupted = True
                shown.say("stopping: each run saves its state after the step it is in; Ctrl-C again aborts at once")
                for each in working.values():
                    each.process.terminate()
            time.sleep(_LOOK_EVERY)
    return failures, interrupted


class _Working:
    """A child that was started."""

    def __init__(self, child: Child, share: Mapping[str, str], shown: Display) -> None:
        self.child, self._shown = child, shown
        self._record = Record(child.folder, child.steps)
        child.log.parent.mkdir(parents=True, exist_ok=True)
        with child.log.open("ab") as log:
            log.write(f"--- {shlex.join(child.command)}\n".encode())
            log.flush()
            self.process = subprocess.Popen(
                child.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **share, _PARENT: str(os.getpid()), "PYTHONUNBUFFERED": "1"},
                process_group=0,  # Ctrl-C reaches this process only, which passes it on once
            )
        shown.show(child.label, self._record.read())

    def look(self, told: bool) -> int | None:
        """Shows progress; the exit code once the child has ended."""
        code = self.process.poll()
        self._shown.show(self.child.label, self._record.read())
        if code is None:
            return None
        if told and code == -signal.SIGTERM:  # it was still starting and had nothing to save
            code = INTERRUPTED
        self._shown.end(self.child.label, {0: "finished", INTERRUPTED: "interrupted"}.get(code, "failed"))
        return code


@contextmanager
def _killed_on_error(working: Mapping[int, _Working]) -> Iterator[None]:
    try:
        yield
    except BaseException:
        for each in working.values():
            each.process.kill()
            each.process.wait()
        raise


# --- the machine and its shares ---------------------------------------------------------------------------------------


def divide(cores: int, gpus: Sequence[str], devices: Set[str], jobs: int | None, runs: int) -> list[dict[str, str]]:
    """The environment variables of each slot, so that runs at the same time do not fight for cores or GPUs.

    Args:
        cores: CPU cores there are.
        gpus: ids of the GPUs there are.
        devices: the `device` settings of the runs.
        jobs: runs at a time; None: one for each GPU if the runs use them, else one for each core.
        runs: how many runs there are in all.
    """
    spread = bool(gpus) and devices <= {"auto", "cuda"}
    if jobs is None:
        # A device named by number, or one this function knows nothing of, is taken to hold one run.
        jobs = len(gpus) if spread else cores if devices <= {"auto", "cpu"} else 1
    jobs = min(jobs, runs)
    threads = str(max(1, cores // jobs))
    shares = [{"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads} for _ in range(jobs)]
    if spread:
        for slot, share in enumerate(shares):
            share["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
    return shares


def usable_cores() -> int:
    """CPU cores this process may use: its affinity, within the quota of its control group."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.is_file():
        limit, period = quota.read_text().split()
        if limit != "max":
            cores = min(cores, max(1, int(limit) // int(period)))
    return cores


def usable_gpus() -> tuple[str, ...]:
    """Ids of the CUDA devices this process may use; torch is asked only where there is an NVIDIA driver."""
    if not (Path("/proc/driver/nvidia").exists() or Path("/dev/nvidiactl").exists() or Path("/dev/dxg").exists()):
        return ()
    import torch

    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return tuple(visible.split(",")[:count]) if visible else tuple(str(index) for index in range(count))


def _say(console: Console, line: str) -> None:
    console.print(line, soft_wrap=True, markup=False, highlight=False)
