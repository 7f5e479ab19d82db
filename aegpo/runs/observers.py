"""Who is told of a run: trackers, plugins and parts; a failing one is blamed by name and cannot harm the run.

An observer says what its failure means by `on_error`: `stop` (the default) ends the run, whose state is saved; `drop`
tells it once, leaves the observer out from there on and notes it in the run's folder for the report:

    dropped.jsonl      a row for each observer that was left out: step, event, observer, error
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pluggy

from aegpo.core import first_edition
from aegpo.core.files import refused
from aegpo.core.foreign import Common, of_user
from aegpo.core.hookspecs import Outcome
from aegpo.core.parts import OnError
from aegpo.core.reports import Evaluation, RunInfo, StepReport
from aegpo.errors import AegpoError, ContractError, ObserverError, PluginError
from aegpo.parallel.team import Team
from aegpo.runs.folders import room_in
from aegpo.runs.records import DroppedRow, RowFile, read_rows

DROPPED = "dropped.jsonl"
Event = Literal[
    "aegpo_on_run_start", "aegpo_on_step_end", "aegpo_on_evaluation", "aegpo_on_checkpoint", "aegpo_on_run_end"
]


@dataclass(frozen=True)
class Dropped:
    """An observer that a run was left without."""

    step: int  # the training step it failed at
    event: str
    observer: str
    error: str

    def plain(self) -> dict[str, Any]:
        """As JSON."""
        return dict(vars(self))


class Observers:
    """The observers of one run, told in the order of their plugin manager: the last registered first."""

    def __init__(
        self, manager: pluggy.PluginManager, run: RunInfo, say: Callable[[str], None], team: Team | None = None
    ) -> None:
        """Makes observers of a run that is told of.

        Args:
            manager: with the plugins; of several processes the first tells them.
            run: what they are told of it.
            say: gets a line for the user where a failure does not end the run.
            team: the processes of the run, which tell their observers at the same time; None: one.
        """
        self._manager, self._run, self._say = manager, run, say
        self._team = Team.alone() if team is None else team
        self._on_error: dict[str, OnError] = {}  # by name in the manager; of those that were added here
        self._record: str | None = None  # the name of the observer that keeps the run's record
        self._left_out: dict[str, Dropped] = {}  # by name

    def add(self, name: str, observer: object, on_error: OnError | None = None, record: bool = False) -> None:
        """Registers an observer under the name that messages use; what has no observer hook is left alone.

        Args:
            name: such as ``tracker 'jsonl'``.
            observer: an object with observer hooks.
            on_error: what its failure means; None: what its own attribute `on_error` says, else stop.
            record: what it writes is the run's record, without which no later state may be saved.
        """
        if not any(attribute.startswith("aegpo_on_") for attribute in dir(type(observer))):
            return
        number, title = 1, name
        while self._manager.has_plugin(title):
            number += 1
            title = f"{name} ({number})"
        self._manager.register(observer, name=title)
        self._on_error[title] = on_error or _declared(title, observer)
        if record:
            self._record = title

    def forget(self) -> None:
        """Takes what was added out of the plugin manager, which may serve another run."""
        for title in self._on_error:
            self._manager.unregister(name=title)

    # --- what they are told --------------------------------------------------------------------------------------

    def started(self) -> None:
        """The run begins, or goes on."""
        self._tell("aegpo_on_run_start", self._run.first_step, {})

    def stepped(self, report: StepReport) -> None:
        """A training step is over."""
        self._tell("aegpo_on_step_end", report.step, {"report": report})

    def evaluated(self, step: int, evaluation: Evaluation) -> None:
        """The held-out prompts were scored."""
        self._tell("aegpo_on_evaluation", step, {"step": step, "evaluation": evaluation})

    def saved(self, step: int, path: Path) -> None:
        """A checkpoint is on disk."""
        self._tell("aegpo_on_checkpoint", step, {"step": step, "path": path})

    def ended(self, step: int, outcome: Outcome) -> None:
        """The run is over."""
        self._tell("aegpo_on_run_end", step, {"outcome": outcome})

    def gave_up(self, step: int, outcome: Outcome) -> None:
        """The run is over by an error, which counts: an observer that fails now is only said to have done so."""
        try:
            self._tell_here("aegpo_on_run_end", step, {"outcome": outcome})  # the other processes may be gone
        except OSError as error:  # a tracker may try to write its rest
            if not refused(error, self._run.folder):
                raise
        except ObserverError as error:
            self._say(str(error))

    def _tell(self, event: Event, step: int, told: dict[str, Any]) -> None:
        """Tells everyone in every process, and raises the first failure that stops the run.

        Raises:
            ObserverError: if an observer failed that the run does not go on without.
            DiskError: if the run's record cannot be written: for lack of room, or since its folder was taken away.
        """
        known = set(self._left_out)
        with self._team.agreed(f"who watches is told after step {step}"), room_in(self._run.folder):
            self._tell_here(event, step, told)
        lost = [each.plain() for name, each in self._left_out.items() if name not in known]
        for each in self._team.told(f"who is left out after step {step}", lost):
            for row in each:
                self._drop(Dropped(**row))

    def _tell_here(self, event: Event, step: int, told: dict[str, Any]) -> None:
        """Tells everyone in this process, and raises the first failure: that of the run's record before all others."""
        failures: dict[str, BaseException] = {}
        for name, function, names in self._hooks(event):
            try:
                self._call(function, names, told)
            except BaseException as error:  # it may fail in any way; the user needs to know whose failure it is
                if of_user(error):
                    raise
                if self._rule(name) == "drop":
                    self._drop(Dropped(step, event, name, first_edition.told(error, "tracker")))
                else:
                    failures[name] = error
        first = self._record if self._record in failures else next(iter(failures), None)
        if first is not None:
            raise self._blamed(event, first, failures[first]) from failures[first]

    def _call(self, function: Callable[..., object], names: tuple[str, ...], told: Mapping[str, Any]) -> None:
        """Tells one observer, who gets records of his own and may change nothing that others rely on."""
        known, common = {"run": self._run, **{name: _copied(value) for name, value in told.items()}}, Common.now()
        try:
            function(*(known[each] for each in names))
        except BaseException:
            common.restore()
            raise
        if (changed := common.restore()) is not None:
            raise ContractError(f"it {changed}")

    def _hooks(self, event: Event) -> Iterator[tuple[str, Callable[..., object], tuple[str, ...]]]:
        for hook in reversed(getattr(self._manager.hook, event).get_hookimpls()):
            if not self._team.first and hook.plugin_name not in self._on_error:
                continue  # a plugin, told by the first process
            if hook.hookwrapper or hook.wrapper:
                raise PluginError(
                    f"plugin {hook.plugin_name!r} wraps the observer hook {event!r}, which only tells; drop 'wrapper'"
                )
            if hook.plugin_name not in self._left_out:
                yield hook.plugin_name, hook.function, hook.argnames

    def _rule(self, name: str) -> OnError:
        return self._on_error.get(name) or _declared(f"plugin {name!r}", self._manager.get_plugin(name))

    def _drop(self, dropped: Dropped) -> None:
        """Leaves an observer out, which the first process tells."""
        if dropped.observer in self._left_out:
            return
        self._left_out[dropped.observer] = dropped
        if self._team.first:
            self._say(f"{dropped.observer} failed with {dropped.error}; the run goes on without it")
            RowFile(self._run.folder / DROPPED).append(dropped.plain())

    def _blamed(self, event: Event, name: str, error: BaseException) -> Exception:
        if isinstance(error, OSError) and refused(error, self._run.folder) and name == self._record:
            return error
        who = name if name in self._on_error else f"plugin {name!r}"
        failed = f"{who} failed with {first_edition.told(error, 'tracker')} (in {event})"
        blamed = ObserverError(f"{who}: {error}" if isinstance(error, AegpoError) else failed)
        blamed.recorded = name != self._record
        kind, _, label = who.partition(" ")
        blamed.part = (kind, label.strip("'"))
        return blamed


def _declared(title: str, observer: object) -> OnError:
    """What a foreign observer says of its failures."""
    declared = getattr(observer, "on_error", "stop")
    if declared not in ("stop", "drop"):
        raise PluginError(f"{title} declares 'on_error' as {declared!r}; it is 'stop' or 'drop'")
    return "drop" if declared == "drop" else "stop"


def read_dropped(folder: Path) -> tuple[Dropped, ...]:
    """The observers that a run was left without; nothing where none was.

    Raises:
        CheckpointError: if the file is damaged.
    """
    rows = read_rows(folder / DROPPED, DroppedRow).whole()
    return tuple(Dropped(row["step"], row["event"], row["observer"], row["error"]) for row in rows)


def _copied(told: Any) -> Any:
    """A record for one observer, who may do with it as he likes."""
    if isinstance(told, Evaluation):
        scores, base = ({label: each.copy() for label, each in of.items()} for of in (told.scores, told.base_scores))
        return replace(told, scores=scores, base_scores=base, images=told.images.clone())
    if isinstance(told, StepReport):
        signals = {name: replace(each, values=each.values.copy()) for name, each in told.signals.items()}
        own = replace(told, counts=told.counts.copy(), selected=told.selected.copy(), signals=signals)
        metrics, unrecorded = dict(told.metrics), dict(told.unrecorded)
        return replace(own, metrics=metrics, seconds=dict(told.seconds), unrecorded=unrecorded)
    return told
