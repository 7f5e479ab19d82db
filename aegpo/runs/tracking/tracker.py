"""The tracker `accelerate`: a run of ours as one run at a tracking service, however often it is broken off.

What a service was told is noted in the run's folder, beside the pictures of the base policy:

    tracking/SERVICE.json     id: the run's at the service; step, evaluation: the last ones it was told
    tracking/base-0.png       of panels that show the base beside the policy

A run that goes on from a checkpoint does some steps again, to the same bits. What was told of them stands, and they are
not told twice. What a service had taken and not yet written when its machine went down is lost there; the run's own
record has it.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, JsonValue, field_validator

from aegpo.core.addresses import has_user
from aegpo.core.hookspecs import Outcome, hookimpl
from aegpo.core.parts import TrackerSpec
from aegpo.core.registry import suggestion
from aegpo.core.reports import Evaluation, RunInfo, StepReport
from aegpo.errors import AegpoError
from aegpo.runs.manifest import identity, read_manifest
from aegpo.runs.records import read_document, write_document
from aegpo.runs.tracking.apart import apart
from aegpo.runs.tracking.numbers import evaluation_numbers, flat, step_numbers
from aegpo.runs.tracking.panels import keep, kept, panels, pictures
from aegpo.runs.tracking.services import SERVICES, Place, installed, service_of

_SECRET = re.compile(r"(api_?key|token|secret|passw|credential|^key$)", re.IGNORECASE)
_KEYS = ("id", "begun", "step", "evaluation")


class AccelerateTracker(TrackerSpec):
    """A tracking service through accelerate: wandb, trackio, mlflow, comet_ml, aim, swanlab, clearml or dvclive.

    Credentials, addresses and whatever else a service reads from its environment stay there.
    """

    kind: Literal["accelerate"] = "accelerate"
    log_with: str = Field(
        description="wandb, trackio, mlflow, comet_ml, aim, swanlab, clearml, dvclive, or what was registered with "
        "accelerate.tracking.register_tracker_class"
    )
    project: str | None = Field(None, description="where runs are listed; null: the experiment's name")
    group: str | None = Field(None, description="what belongs together in it; null: the arm")
    tags: tuple[str, ...] = Field((), description="more words to find the run by")
    offline: bool = Field(False, description="nothing is sent: the service's own files, to be sent later or looked at")
    images: bool = Field(True, description="a panel of each evaluation: the base beside the policy, the same noise")
    init: Mapping[str, JsonValue] = Field(
        default={}, description="more arguments of the service's own init, before those that are made here; no secrets"
    )

    @field_validator("log_with")
    @classmethod
    def _is_no_slip(cls, name: str) -> str:
        if name in ("tensorboard", "all"):
            raise ValueError(f"{name!r} is not logged with here; write the tracker 'tensorboard', or one service each")
        close = suggestion(name, SERVICES)
        if name not in SERVICES and close.startswith("did you mean"):
            raise ValueError(f"accelerate has no tracker {name!r}; {close}")
        return name

    @field_validator("init")
    @classmethod
    def _has_no_secret(cls, given: Mapping[str, JsonValue]) -> Mapping[str, JsonValue]:
        for key, value in flat(given).items():
            secret = _SECRET.search(key.rpartition(".")[2]) is not None
            if secret or (isinstance(value, str) and (has_user(value) or "token=" in value)):
                raise ValueError(
                    f"{key!r} is refused, since a secret would be recorded in the manifest; put it into the variable "
                    "of the environment that the service reads"
                )
        return given

    def build(self, folder: Path) -> AccelerateObserver:
        """An observer that begins the run at the service once it is told of it.

        Raises:
            AegpoError: if the service's package is not installed, or accelerate has no such tracker.
        """
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS as KNOWN

        if self.log_with not in KNOWN:
            raise AegpoError(
                f"accelerate has no tracker {self.log_with!r}; known: {', '.join(sorted(KNOWN))}; a plugin adds one "
                "with accelerate.tracking.register_tracker_class"
            )
        installed(self.log_with)
        return AccelerateObserver(self, folder)


class AccelerateObserver:
    """Tells one run's steps and evaluations to a service."""

    def __init__(self, spec: AccelerateTracker, folder: Path) -> None:
        self._spec, self._service = spec, service_of(spec.log_with)
        self._own = folder / "tracking"
        self._note = self._own / f"{spec.log_with}.json"
        self._known: dict[str, Any] = {}  # what `_note` says
        self._tracker: Any = None  # accelerate's, while the run is under way
        self._base: list[Any] = []  # pictures of the untrained policy

    @hookimpl
    def aegpo_on_run_start(self, run: RunInfo) -> None:
        """Begins the run at the service, or goes on with it there.

        Raises:
            AegpoError: if the service cannot be reached or refuses; with what to do about it.
        """
        manifest = read_manifest(run.folder) if (run.folder / "manifest.json").exists() else {}
        begun = _begun_with(manifest)
        known = self._read()
        resumed = known.get("begun") == begun or (run.first_step > 0 and bool(known))
        self._own.mkdir(parents=True, exist_ok=True)
        name = known["id"] if resumed else secrets.token_hex(16)
        place = self._place(run, manifest.get("experiment", {}), name, resumed)
        with self._telling("begin the run", self._service.way_out):
            tracker = self._started(place)
            found = self._service.begun(tracker, place)
            if not resumed:
                tracker.store_init_configuration(dict(place.config))
        self._tracker = tracker
        self._known = known if resumed else {"id": found, "begun": begun, "step": 0, "evaluation": -1}
        self._write({})
        self._base = kept(self._own)

    def _place(self, run: RunInfo, experiment: Mapping[str, Any], name: str, resumed: bool) -> Place:
        spec = self._spec
        return Place(
            project=spec.project or experiment.get("name", "aegpo"),
            group=spec.group or run.arm,
            name=f"{run.arm}/seed-{run.seed}",
            tags=spec.tags,
            id=name,
            resumed=resumed,
            folder=run.folder,
            offline=spec.offline,
            config=flat({**experiment, "arm": run.arm}),
            about=experiment.get("about"),
        )

    def _started(self, place: Place) -> Any:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS as KNOWN

        kind, options = KNOWN[self._spec.log_with], {**self._service.options(place), **self._spec.init}
        first = self._spec.project or self._service.first(place)
        if self._spec.log_with not in SERVICES and kind.requires_logging_directory:
            options = {"logging_dir": str(self._own), **options}
        tracker = kind(first, **options)
        tracker.main_process_only = False  # this is the first process: nobody else needs to be asked
        tracker.start()
        return tracker

    @hookimpl
    def aegpo_on_step_end(self, run: RunInfo, report: StepReport) -> None:
        """Tells the step's numbers, once."""
        if report.step <= self._known["step"]:
            return
        with self._telling(f"take step {report.step}"):
            self._tracker.log(step_numbers(report), step=report.step)
        self._write({"step": report.step})

    @hookimpl
    def aegpo_on_evaluation(self, run: RunInfo, step: int, evaluation: Evaluation) -> None:
        """Tells the mean scores and shows the panels, once."""
        if step == 0 and self._spec.images:  # the untrained policy is the base
            self._base = pictures(evaluation.images)
            keep(self._base, self._own)
        if step <= self._known["evaluation"]:
            return
        with self._telling(f"take the evaluation after step {step}"):
            self._tracker.log(evaluation_numbers(evaluation), step=step)
            if self._spec.images:
                self._service.show(self._tracker, "evaluation", panels(evaluation, self._base), step)
        self._write({"evaluation": step})

    @hookimpl
    def aegpo_on_run_end(self, run: RunInfo, outcome: Outcome) -> None:
        """Lets the service write what it still has."""
        tracker, self._tracker = self._tracker, None
        if tracker is not None:
            with self._telling("end the run"):
                tracker.finish()

    def _read(self) -> dict[str, Any]:
        """What was told so far; nothing if nothing was, or a crash left less than a whole note."""
        if not self._note.exists():
            return {}
        return read_document(self._note, _KEYS, "delete it: the service then has what follows as another run")

    def _write(self, told: Mapping[str, int]) -> None:
        self._known |= told
        write_document(self._note, self._known)

    @contextmanager
    def _telling(self, what: str, way_out: str = "the run's own record has it") -> Iterator[None]:
        """Inside, the service is at work; its failure is one line.

        Raises:
            AegpoError: that line, for any failure of the service.
        """
        name = self._spec.log_with
        try:
            with apart():
                yield
        except Exception as error:
            said = " ".join(str(error).split()) or type(error).__name__
            raise AegpoError(f"{name} did not {what}: {said}; {way_out}") from error


def _begun_with(manifest: Mapping[str, Any]) -> str:
    """What tells an experiment that was corrected before anything was learned from what was told of before."""
    return str(identity(manifest)["experiment"]) if manifest else ""
