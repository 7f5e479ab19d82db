"""Runs as jobs: submitted, or found again, and followed by what their folders show, until all are over or left."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from aegpo.clusters import notes
from aegpo.clusters.interface import Cluster, State
from aegpo.clusters.jobs import Job
from aegpo.clusters.settings import Kind
from aegpo.errors import AegpoError
from aegpo.runs.child_processes import INTERRUPTED, Child, Failure, StopSignals
from aegpo.runs.folders import Run
from aegpo.runs.progress import Display, Record

_LOOK_EVERY = 0.5  # seconds between looks at the run folders
_ASK_EVERY = {"local": 1.0, "ray": 2.0, "slurm": 5.0}  # seconds between questions to a cluster
_LATE = 15.0  # seconds by which the note of a job's end may come later than the cluster's word, over a network disk
_LOG_LINES = 15


@dataclass
class Followed:
    """A run and the job that computes it."""

    run: Run
    child: Child  # its command, log and steps, as of a run in a process of its own
    job: str = ""  # as the cluster calls it
    number: str = ""  # of the submission
    begun: bool = False  # seen running
    state: State = field(default_factory=lambda: State("unknown"))
    over: float | None = None  # when it was found to be over


@dataclass(frozen=True)
class Lost:
    """A job that ended without a word of its command."""

    followed: Followed
    cluster: Kind

    def __str__(self) -> str:
        child, why = self.followed.child, self.followed.state.why
        told = f" ({why})" if why else ""
        text = child.log.read_text(encoding="utf-8", errors="replace") if child.log.exists() else ""
        lines = text.rpartition("\n--- ")[2].splitlines()[-_LOG_LINES:]
        tail = "\n".join(f"  | {line}" for line in lines) or "  | (nothing)"
        return (
            f"{child.label} failed: its job {self.followed.job} of {self.cluster} was ended before its command was"
            f"{told}; the same command goes on from the newest checkpoint; the end of {child.log}:\n{tail}"
        )


class Following:
    """The jobs of an experiment's runs."""

    def __init__(self, kind: Kind, cluster: Cluster, runs: Sequence[tuple[Run, Child]]) -> None:
        self._kind, self._cluster = kind, cluster
        self._left = [Followed(run, child) for run, child in runs]
        self._records = {each.child.label: Record(each.run.folder, each.child.steps) for each in self._left}
        self.failures: list[Failure | Lost] = []
        self.interrupted = self.cancelled = False
        self._asked = 0.0

    @property
    def jobs(self) -> list[str]:
        """Those that go on."""
        return [each.job for each in self._left]

    def begin(self, job_of: Callable[[Run, str], Job], say: Callable[[str], None], number: Callable[[], str]) -> bool:
        """Submits a job for each run that none computes; False if Ctrl-C or SIGTERM came before the last.

        Args:
            job_of: the job of a run, with the number of its submission.
            say: gets a line for each.
            number: a new one.

        Raises:
            AegpoError: if a job of another cluster computes a run, or the cluster refuses one.
        """
        for each in self._left:
            handle = notes.kept(each.run)
            if handle is None:
                continue
            if handle.cluster != self._kind:
                raise AegpoError(
                    f"{each.run.label}: job {handle.job} of {handle.cluster} computes it; give the command with "
                    f"--cluster {handle.cluster}, or delete {notes.note_of(each.run)} once that job is over"
                )
            if self._cluster.poll([handle.job])[handle.job].where != "over":
                each.job, each.number = handle.job, handle.number
                say(f"{each.run.label}: job {each.job} of {self._kind} was submitted before")
        with StopSignals() as stop:  # none comes between a job and its note
            for each in self._left:
                if not each.job and not stop.wanted():
                    each.number = number()
                    each.job = self._cluster.submit(job_of(each.run, each.number), each.run.label)
                    notes.keep(each.run, notes.Handle(self._kind, each.job, each.number))
                    say(f"{each.run.label}: job {each.job} of {self._kind}")
            begun = not stop.wanted()
        self._left = [each for each in self._left if each.job]  # the same command submits the others
        return begun

    def cancel(self) -> None:
        """Asks the cluster to end all jobs."""
        for each in self._left:
            self._cluster.cancel(each.job)
        self.cancelled = True
        self._asked = 0.0

    def follow(self, shown: Display) -> bool:
        """Shows runs until all jobs are over; False if Ctrl-C or SIGTERM came before."""
        with StopSignals() as stop:
            for each in self._left:
                shown.show(each.child.label, self._records[each.child.label].read())
            while self._left:
                if stop.wanted():
                    return False
                self._look(shown)
                time.sleep(_LOOK_EVERY if self._left else 0)
        return True

    def _look(self, shown: Display) -> None:
        if time.monotonic() - self._asked >= _ASK_EVERY[self._kind]:
            self._asked = time.monotonic()
            states = self._cluster.poll(self.jobs)
            for each in self._left:
                self._tell(each, states[each.job], shown)
        for each in list(self._left):
            shown.show(each.child.label, self._records[each.child.label].read())
            if each.over is not None and self._ended(each, shown):
                self._left.remove(each)
                notes.forget(each.run)

    def _tell(self, each: Followed, state: State, shown: Display) -> None:
        """Says how a job stands where that is new."""
        before, each.state = each.state, state
        if state.where == "over":
            each.over = time.monotonic() if each.over is None else each.over
            return
        each.over = None
        if state == before or (before.where == "unknown" and state.where == "running"):
            pass
        elif state.where == "pending" and each.begun:
            shown.say(f"{each.child.label}: job {each.job} waits to be started again{_why(state)}")
        elif state.where == "unknown" or state.where != before.where:
            shown.say(f"{each.child.label}: job {each.job} is {state.where}{_why(state)}")
        each.begun |= state.where == "running"

    def _ended(self, each: Followed, shown: Display) -> bool:
        """True once it is known how a job that is over ended."""
        code, label = notes.ended(each.run, each.number), each.child.label
        if code is None and each.over is not None and time.monotonic() - each.over < _LATE and not each.run.finished:
            return False
        if each.run.finished:
            shown.end(label, "finished")
        elif code == INTERRUPTED:
            self.interrupted = True
            shown.end(label, "interrupted")
        else:
            each.child.log.touch()
            self.failures.append(Lost(each, self._kind) if code is None else Failure(each.child, code))
            shown.end(label, "failed")
        return True


def _why(state: State) -> str:
    return f" ({state.why})" if state.why else ""
