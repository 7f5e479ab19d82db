"""Jobs of Slurm and of this machine, by submitit: it writes what starts them, and starts a job of Slurm again.

Of a job of Slurm `squeue` is asked, which needs no accounting. Slurm sends a signal `signal_delay_s` before the end of
its time, or of its life where others may take its place: the run saves its state, and the job is queued again.
"""

from __future__ import annotations

import getpass
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from aegpo.clusters.interface import State
from aegpo.clusters.jobs import Job, Node, Work
from aegpo.clusters.settings import Value
from aegpo.errors import AegpoError

if TYPE_CHECKING:
    import submitit
    from submitit.helpers import DelayedSubmission

MINUTES = 24 * 60  # of a job, unless the user says otherwise; then it is queued again
_SAVING = 300  # seconds before that at which it is told, or a quarter of its time
_TIMES = 1_000_000  # how often it may run out of time
_FOREVER = 10 * 365 * 24 * 60  # minutes
_PATIENCE = 60.0  # seconds that Slurm may take to answer
_RUNNING = ("RUNNING", "COMPLETING", "STOPPED", "SUSPENDED", "SIGNALING", "STAGE_OUT", "RESIZING")


class Task:
    """What submitit starts: a job, on one of its nodes."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._work: Work | None = None

    def __call__(self) -> int:
        """Runs it to its end; the exit code."""
        import submitit

        here = submitit.JobEnvironment()
        self._work = Work(self._job, Node(here.global_rank, attempt=os.environ.get("SLURM_RESTART_COUNT", "0")))
        return self._work.run()

    def checkpoint(self) -> DelayedSubmission:
        """Called amid it, before its node is lost: once its state is saved, what is to be started in its place."""
        from submitit.helpers import DelayedSubmission

        if self._work is not None:
            self._work.stopped()
        return DelayedSubmission(Task(self._job))


class Slurm:
    """Jobs of Slurm."""

    def __init__(self, folder: Path, settings: Mapping[str, Value], nodes: int, gpus: int | None) -> None:
        """Nothing is asked of Slurm yet.

        Args:
            folder: which all nodes see.
            settings: see `settings.KNOWN`.
            nodes: of each job.
            gpus: of each node; None: as the settings say.

        Raises:
            AegpoError: if submitit or Slurm is not here, or cannot take a setting.
        """
        _here()
        import submitit

        try:
            self._executor = submitit.SlurmExecutor(folder, max_num_timeout=_TIMES)
        except RuntimeError as error:
            raise AegpoError(
                "--cluster slurm: there is no 'srun' here; give the command where Slurm's are, such as a login node"
            ) from error
        asked = {"time": MINUTES, **settings}
        asked.setdefault("signal_delay_s", min(_SAVING, 15 * int(str(asked["time"]))))
        if gpus is not None:
            asked["gpus_per_node"] = gpus
        kept = {"requeue": True}  # where a node fails
        self._executor.update_parameters(
            **asked, nodes=nodes, ntasks_per_node=1, stderr_to_stdout=True, additional_parameters=kept
        )

    def submit(self, job: Job, label: str) -> str:
        """As `Cluster.submit`."""
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        self._executor.update_parameters(job_name=f"aegpo {label}")
        try:
            return str(self._executor.submit(Task(job)).job_id)
        except (FailedJobError, FailedSubmissionError, OSError) as error:
            said = [line for line in str(error).splitlines() if "error" in line.lower()]
            raise AegpoError(f"{label}: Slurm took no job: {said[-1] if said else error}") from error

    def poll(self, jobs: Sequence[str]) -> Mapping[str, State]:
        """As `Cluster.poll`."""
        told = _asked("squeue", "--noheader", "--user", getpass.getuser(), "--format", "%i|%T|%r")
        if told is None:
            return {job: State("unknown", "squeue does not answer") for job in jobs}
        rows = [line.strip().split("|") for line in told.splitlines() if line.count("|") == 2]
        known = {job: (state, why) for job, state, why in rows}
        return {job: _state(*known[job]) if job in known else self._end(job) for job in jobs}

    def cancel(self, job: str) -> None:
        """As `Cluster.cancel`."""
        _asked("scancel", job)

    def _end(self, job: str) -> State:
        """What Slurm says of a job that is not queued any more, as long as it says anything."""
        told = _asked("scontrol", "--oneliner", "show", "job", job) or ""
        words = dict(word.split("=", 1) for word in told.split() if "=" in word)
        why = ", ".join(each for each in (words.get("JobState"), words.get("Reason")) if each not in (None, "None"))
        return State("over", why)


class Local:
    """Jobs of this machine, which go on without the command that started them, in as many slots as it has shares."""

    def __init__(self, folder: Path) -> None:
        """Nothing is started yet.

        Args:
            folder: for what submitit writes.

        Raises:
            AegpoError: if submitit is not here.
        """
        _here()
        import submitit

        self._folder = folder
        self._executor = submitit.LocalExecutor(folder)
        # Submitit's `setup` would put a shell above what it starts, which passes no signal on: the job has its own.
        self._executor.update_parameters(timeout_min=_FOREVER, stderr_to_stdout=True)
        self._mine: dict[str, submitit.Job[int]] = {}

    def submit(self, job: Job, label: str) -> str:
        """As `Cluster.submit`."""
        with _apart():
            mine = self._executor.submit(Task(job))
        self._mine[mine.job_id] = mine
        return str(mine.job_id)

    def poll(self, jobs: Sequence[str]) -> Mapping[str, State]:
        """As `Cluster.poll`."""
        return {job: State("running" if self._alive(job) else "over") for job in jobs}

    def cancel(self, job: str) -> None:
        """As `Cluster.cancel`."""
        if self._alive(job):
            with suppress(ProcessLookupError):
                os.kill(int(job), signal.SIGTERM)

    def _alive(self, job: str) -> bool:
        if job in self._mine:
            return not self._mine[job].done()
        try:
            os.kill(int(job), 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return False  # somebody else's, who has its number now
        told = Path(f"/proc/{job}/cmdline")
        return not told.exists() or str(self._folder).encode() in told.read_bytes()


def _here() -> None:
    try:
        import submitit  # noqa: F401
    except ImportError as error:
        raise AegpoError(f'--cluster needs {error.name}; run  pip install "aegpo[slurm]"') from error


@contextmanager
def _apart() -> Iterator[None]:
    """Inside, what is started hears neither the terminal's Ctrl-C nor its end, and holds none of its streams open."""
    numbers = [signal.SIGINT, *([signal.SIGHUP] if sys.platform != "win32" else [])]
    with ExitStack() as held:
        for number in numbers:
            before = signal.signal(number, signal.SIG_IGN)
            held.callback(signal.signal, number, signal.SIG_DFL if before is None else before)
        nowhere = os.open(os.devnull, os.O_RDWR)
        held.callback(os.close, nowhere)
        for stream in (0, 1, 2):
            kept = os.dup(stream)
            held.callback(os.close, kept)
            held.callback(os.dup2, kept, stream)
            os.dup2(nowhere, stream)
        yield


def _asked(*words: str) -> str | None:
    """What one of Slurm's commands prints; None if it fails."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=_PATIENCE)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def _state(told: str, why: str) -> State:
    return State("running" if told in _RUNNING else "pending", "" if why == "None" else why)
