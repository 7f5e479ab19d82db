"""The loop of a run: training steps, evaluations, checkpoints, and a state on disk however it ends.

    start -> [evaluation] -> step -> [evaluation] -> [checkpoint] -> step -> ... -> end

A checkpoint of sharded weights is written while the run goes on, and is on disk before the next one is begun. A
checkpoint says which evaluation was the last, so that one that failed is made up for when the run goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Literal

from aegpo.core.reports import RunInfo
from aegpo.errors import (
    AegpoError,
    CheckpointError,
    ContractError,
    MemoryShortageError,
    ObserverError,
    PlanError,
    ProcessLostError,
)
from aegpo.parallel.dtensors import sharded
from aegpo.parallel.faults import agreed_on, in_other_words
from aegpo.runs import checkpoints
from aegpo.runs.folders import room_in
from aegpo.runs.observers import Observers
from aegpo.runs.resuming import counted
from aegpo.runs.saving import Saving, begin
from aegpo.train.engine import Engine, Snapshot

_Fault = (ContractError, PlanError, MemoryShortageError)  # that a step may have before it has learned anything


class Loop:
    """One run from where it stands to its end."""

    def __init__(
        self, engine: Engine, run: RunInfo, observers: Observers, identity: Mapping[str, Any] | None = None
    ) -> None:
        """`engine` has the state of `run.first_step`; checkpoints note `identity`, what tells the run from others."""
        self._engine, self._run, self._observers, self._identity = engine, run, observers, identity
        self._team = engine.team
        self._done = self._begun = self._saved = run.first_step  # training steps; begun: to be saved
        self._saving: Saving | None = None  # what is being written
        self._evaluated: int | None = None  # the step of the last evaluation

    def run(self, should_stop: Callable[[], bool]) -> Literal["finished", "interrupted"]:
        """Trains to the end, or until asked to stop; the state is on disk when it returns.

        Raises:
            ContractError: if a part fails; all that was learned before is on disk then, and the message says so.
            MemoryShortageError: if memory runs out; the message says what to lower, and what is on disk.
            ObserverError: if an observer fails that the run does not go on without; the state is on disk.
        """
        try:
            self._observers.started()
            outcome = self._train(should_stop)
        except BaseException as error:
            self._keep_what_was_begun(error)
            self._observers.gave_up(self._done, "interrupted" if isinstance(error, KeyboardInterrupt) else "failed")
            raise
        self._tell(lambda: self._observers.ended(self._done, outcome))
        return outcome

    def _train(self, should_stop: Callable[[], bool]) -> Literal["finished", "interrupted"]:
        run, spec = self._run, self._engine.experiment
        self._open_sources()
        if run.owes_evaluation:
            self._evaluate()
        while self._done < run.training_steps:
            if self._saving is not None and self._saving.in_place():
                self._finish()
            if self._team.any(f"whether to stop after step {self._done}", should_stop()):
                self._save_now()
                return "interrupted"
            self._step()
            if self._due(spec.evaluation.every):
                self._evaluate()
            if self._due(spec.checkpoint.every):
                self._save()
        self._finish()
        return "finished"

    def _open_sources(self) -> None:
        """Opens the files of signals; the first process makes them what they were, so the others come after it."""
        sources, step = self._engine.sources, self._run.first_step
        for firsts in (True, False):
            with self._agreed(f"files of signals are opened, {'by the first' if firsts else 'by the others'}"):
                if self._team.first == firsts:
                    sources.open(self._run.folder / "signals", step)

    def _due(self, every: int) -> bool:
        return self._done % every == 0 or self._done == self._run.training_steps

    def _step(self) -> None:
        """The next training step; if a part or the memory fails, what was learned before is not lost."""
        number, before, updates = self._done + 1, self._engine.snapshot(), self._engine.learner.updates
        try:
            with self._agreed(f"step {number}"):
                report = self._engine.step(number)
        except _Fault as error:
            if not self._team.any(f"whether step {number} has learned", self._engine.learner.updates != updates):
                self._save_now(before)
            self._finish()
            raise self._told(error) from error.__cause__
        self._done = number
        self._tell(lambda: self._observers.stepped(report))

    def _evaluate(self) -> None:
        """Scores the held-out prompts; if that fails, the steps before are not lost, and it is done when it goes on."""
        before = self._engine.snapshot()
        try:
            with self._agreed(f"the evaluation after step {self._done}"):
                evaluation = self._engine.evaluator.evaluate(untrained=self._done == 0)
        except _Fault as error:
            self._save_now(before)
            raise self._told(error) from error.__cause__
        self._evaluated = self._done
        self._tell(lambda: self._observers.evaluated(self._done, evaluation))

    def _tell(self, tell: Callable[[], None]) -> None:
        """Tells the observers of what was just done; an observer that stops the run loses nothing of it."""
        try:
            tell()
        except ObserverError as error:
            if error.recorded:
                self._save()
            self._finish()
            raise self._told(error) from error.__cause__

    def _told(self, error: AegpoError) -> AegpoError:
        """The error with what is on disk."""
        kept = f"step {self._saved} and all before it are saved" if self._saved > 0 else "nothing was learned yet"
        return in_other_words(error, f"{error}\n{kept}; the same command goes on from there")

    def _save_now(self, earlier: Snapshot | None = None) -> None:
        """Writes the state after the last step; it is on disk when this returns."""
        self._save(earlier)
        self._finish()

    def _save(self, earlier: Snapshot | None = None) -> None:
        """Writes, or begins to, the state after the last step, unless that was begun or there is none."""
        if self._begun == self._done:
            return
        self._finish()
        number = self._done
        with self._agreed(f"the state after step {number} is saved"):
            self._saving = self._write(number, earlier)
        self._begun = number
        if self._saving is None:
            self._is_saved(number)

    def _write(self, number: int, earlier: Snapshot | None) -> Saving | None:
        """What is being written; None: it is on disk."""
        engine, first = self._engine, self._team.first
        if first:
            engine.sources.write(number)
        if not first and not sharded(engine.policy.weights.trained):
            return None
        tensors, state = engine.state_dict(earlier)
        state["owes_evaluation"] = self._due(engine.experiment.evaluation.every) and self._evaluated != number
        records = counted(self._run.folder) if first else None
        checkpoint = checkpoints.Checkpoint(number, tensors, state, self._identity, records)
        return begin(self._run.folder / "checkpoints", checkpoint, engine.experiment.checkpoint.keep, self._team)

    def _finish(self) -> None:
        """What is being written is on disk when this returns."""
        saving, self._saving = self._saving, None
        if saving is not None:
            with self._agreed(f"the state after step {saving.step} is on disk"):
                saving.finish()
            self._is_saved(saving.step)

    def _is_saved(self, number: int) -> None:
        self._saved = number
        path = self._run.folder / "checkpoints" / f"step-{number:06d}"
        self._tell(lambda: self._observers.saved(number, path))

    def _keep_what_was_begun(self, error: BaseException) -> None:
        """After an error that all processes have: what was being written is no worse for it."""
        if self._saving is None:
            return
        if isinstance(error, Exception) and agreed_on(error) and not isinstance(error, ProcessLostError):
            with suppress(CheckpointError, ObserverError):  # the first error counts
                self._finish()

    @contextmanager
    def _agreed(self, where: str) -> Iterator[None]:
        """Inside, whatever one process raises all of them raise; a disk that refuses is told as such."""
        with self._team.agreed(where), room_in(self._run.folder):
            yield


def owes_evaluation(checkpoint: checkpoints.Checkpoint | None) -> bool:
    """True if a run that goes on from here has to score the held-out prompts first.

    Raises:
        CheckpointError: if a step of the checkpoint is only half recorded, as version 0.1.0 wrote it.
    """
    if checkpoint is None:
        return True
    if checkpoint.state.get("unreported") is not None:
        raise CheckpointError(
            f"the checkpoint of step {checkpoint.step} holds a step more, whose evaluation failed under aegpo 0.1; go "
            "on with aegpo 0.1 until the next checkpoint, delete this one to go on from an earlier one, or start over "
            "with --fresh"
        )
    return bool(checkpoint.state.get("owes_evaluation", False))  # version 0.1.0 did not note it
