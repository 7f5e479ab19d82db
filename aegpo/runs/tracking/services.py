"""The services that accelerate has trackers for: what each is given when a run begins or goes on there, and is shown.

Keyword arguments are those of each service's own `init`, which accelerate passes on. What a service reads from its
environment is left to it: an argument is not given where its variable is set. Folders are below the run's own, or
beside the arms where a service has one store for all of them.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aegpo.errors import AegpoError
from aegpo.runs.tracking.panels import Panel

Options = dict[str, Any]


@dataclass(frozen=True)
class Place:
    """What a run is called at a service, and where it is on disk."""

    project: str  # the experiment's name, unless the tracker names another one
    group: str  # the arm
    name: str  # ARM/seed-S
    tags: tuple[str, ...]
    id: str  # letters and digits: made when the run begins, or given by the service then
    resumed: bool  # the service knows the id
    folder: Path  # the run's own: OUT/NAME/ARM/seed-S
    offline: bool
    config: Mapping[str, bool | int | float | str] = field(default_factory=dict)  # the experiment, flat
    about: str | None = None  # a sentence about the arm, where its experiment has one under that key

    @property
    def own(self) -> Path:
        """The folder for what is of this run alone."""
        return self.folder / "tracking"

    @property
    def common(self) -> Path:
        """The folder of all arms."""
        return self.folder.resolve().parents[1]


@dataclass(frozen=True)
class Service:
    """How accelerate's tracker of a service is begun and shown pictures."""

    package: str  # what pip installs it by
    way_out: str  # of a failure at the beginning
    options: Callable[[Place], Options]
    show: Callable[[Any, str, Sequence[Panel], int], None]  # accelerate's tracker, a name, panels, the step
    first: Callable[[Place], str] = field(default=lambda place: place.project)  # the tracker's first argument
    begun: Callable[[Any, Place], str] = field(default=lambda tracker, place: place.id)  # the id from then on


def _unless_set(variables: Mapping[str, Options]) -> Options:
    """Arguments of which no variable of the environment, in whose place they stand, is set."""
    found: Options = {}
    for variable, options in variables.items():
        if not os.environ.get(variable):
            found |= options
    return found


# --- Weights & Biases, Trackio, SwanLab: one interface in three houses -----------------------------------------------


def _wandb(place: Place) -> Options:
    mode = {"mode": "offline"} if place.offline else {}
    named: dict[str, Options] = {
        "WANDB_NAME": {"name": place.name},
        "WANDB_RUN_GROUP": {"group": place.group},
        "WANDB_TAGS": {"tags": list(place.tags)},
        "WANDB_NOTES": {"notes": place.about},
        "WANDB_DIR": {"dir": str(place.own)},
        "WANDB_CONSOLE": {"settings": {"console": "off"}},  # the run's own output goes where the user sends it
    }
    found = {"id": place.id, "resume": "allow", **mode, **_unless_set(named)}
    if found.get("mode", os.environ.get("WANDB_MODE", "online")) == "online":
        _logged_in()
    return found


def _logged_in() -> None:
    """Refuses a W&B without a key, instead of asking for one in the middle of a run's output."""
    import wandb

    if not wandb.login(prompt=False, verify=False):
        raise AegpoError("nobody is logged in")


def _show_wandb(tracker: Any, name: str, shown: Sequence[Panel], step: int) -> None:
    import wandb

    tracker.log_images({name: [wandb.Image(each.picture, caption=each.caption) for each in shown]}, step=step)


def _trackio(place: Place) -> Options:
    remote = [name for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL") if os.environ.get(name)]
    if place.offline and remote:
        raise AegpoError(f"{remote[0]} is set, which sends what is told elsewhere, and 'offline' is true")
    # It knows a run again by its name alone: the newest one of the project that is called so.
    resume = "allow" if place.resumed else "never"
    told = {"name": place.name, "group": place.group, "config": dict(place.config)}  # which each start writes anew
    return {**told, "resume": resume, "embed": False}


def _show_trackio(tracker: Any, name: str, shown: Sequence[Panel], step: int) -> None:
    import trackio

    images = {f"{name}/{row}": trackio.Image(each.picture, each.caption) for row, each in enumerate(shown)}
    tracker.log(images, step=step)


def _swanlab(place: Place) -> Options:
    found = {"id": place.id, "resume": "allow", "name": place.name, "group": place.group, "tags": list(place.tags)}
    mode = {"mode": "offline"} if place.offline else {}
    if place.about:
        found["description"] = place.about
    return {**found, **mode, **_unless_set({"SWANLAB_LOG_DIR": {"log_dir": str(place.own / "swanlog")}})}


def _show_swanlab(tracker: Any, name: str, shown: Sequence[Panel], step: int) -> None:
    import swanlab

    tracker.log({name: [swanlab.Image(each.picture, caption=each.caption) for each in shown]}, step=step)


# --- MLflow ----------------------------------------------------------------------------------------------------------


def _mlflow(place: Place) -> Options:
    found: Options = {"run_name": place.name, "description": place.about}
    if place.offline and not os.environ.get("MLFLOW_TRACKING_URI"):
        import mlflow

        mlflow.set_tracking_uri(f"sqlite:///{place.common / 'mlflow.db'}")
        found["logging_dir"] = (place.common / "mlartifacts").as_uri()
    return {**found, "run_id": place.id} if place.resumed else found


def _begun_mlflow(tracker: Any, place: Place) -> str:
    import mlflow

    mlflow.set_tags({"group": place.group, **dict.fromkeys(place.tags, "true")})
    return str(tracker.tracker.info.run_id)


def _show_mlflow(tracker: Any, name: str, shown: Sequence[Panel], step: int) -> None:
    import mlflow

    for row, each in enumerate(shown):
        mlflow.log_image(each.picture, key=f"{name}/{row}", step=step)
    captions = "".join(f"{row}: {each.caption}\n" for row, each in enumerate(shown))
    mlflow.log_text(captions, f"{name}/step-{step:06d}.txt")  # its images have no captions


# --- Comet, Aim, ClearML, DVCLive ------------------------------------------------------------------------------------


def _comet(place: Place) -> Options:
    import comet_ml

    told = {"name": place.name, "tags": [place.group, *place.tags]}
    settings = _unless_set({"COMET_OFFLINE_DIRECTORY": {"offline_directory": str(place.own)}})
    config = comet_ml.ExperimentConfig(**told, **settings, log_code=False, auto_output_logging="")
    found: Options = {"experiment_key": place.id, "mode": "get_or_create", "experiment_config": config}
    return {**found, "mode": "get" if place.resumed else "create", "online": False} if place.offline else found


def _show_comet(tracker: Any, name: str, shown: Sequence[Panel], step: int) -> None:
    for row, each in enumerate(shown):
        tracker.tracker.log_image(each.picture, f"{name}/{row}", step=step, metadata={"caption": each.caption})


def _aim(place: Place) -> Options:
    quiet = {"system_tracking_interval": None, "capture_terminal_logs": False}
    resumed = {"run_hash": place.id} if place.resumed else {}
    return {"logging_dir": str(place.common), "experiment": place.project, **quiet, **resumed}


def _begun_aim(tracker: Any, place: Place) -> str:
    if not place.resumed:
        for tag in (place.group, *place.tags):
            tracker.tracker.add_tag(tag)
    return str(tracker.tracker.hash)


def _show_aim(tracker: Any, name: str, shown: Sequence[Panel], step: int) -> None:
    tracker.log_images({f"{name}/{row}": (each.picture, each.caption) for row, each in enumerate(shown)}, step=step)


def _clearml(place: Place) -> Options:
    if place.offline:
        import clearml

        clearml.Task.set_offline(True)
    named = {"CLEARML_PROJECT": {"project_name": place.project}, "CLEARML_TASK": {"task_name": place.name}}
    hands_off = {"auto_connect_frameworks": False, "auto_connect_arg_parser": False, "auto_connect_streams": False}
    known: Options = {"continue_last_task": place.id} if place.resumed else {"reuse_last_task_id": False}
    return {**_unless_set(named), "tags": [place.group, *place.tags], **hands_off, **known}


def _show_clearml(tracker: Any, name: str, shown: Sequence[Panel], step: int) -> None:
    for row, each in enumerate(shown):
        tracker.log_images({f"{name}/{row}": each.picture}, step=step)
        tracker.tracker.get_logger().report_text(f"{name}/{row}, step {step}: {each.caption}", print_console=False)


def _dvclive(place: Place) -> Options:
    return {"dir": str(place.own / "dvclive"), "resume": place.resumed, "save_dvc_exp": False, "dvcyaml": False}


def _show_dvclive(tracker: Any, name: str, shown: Sequence[Panel], step: int) -> None:
    tracker.tracker.step = step
    for row, each in enumerate(shown):  # what it has of an earlier step would be written over
        tracker.tracker.log_image(f"{name}/step-{step:06d}-{row}.png", each.picture)


# --- any other that is registered with accelerate --------------------------------------------------------------------


def _show_other(tracker: Any, name: str, shown: Sequence[Panel], step: int) -> None:
    if hasattr(tracker, "log_images"):
        tracker.log_images({name: [each.picture for each in shown]}, step=step)


_LOCAL = "mend that, or set 'on_error: drop' to go on without it"
_HALF = "if it was killed while it wrote, delete  tracking/dvclive/metrics.json  in the run's folder"
OTHER = Service("", _LOCAL, lambda place: {}, _show_other)
SERVICES: Mapping[str, Service] = {
    "wandb": Service(
        '"aegpo[wandb]"', "give  wandb login  or set WANDB_API_KEY, or set 'offline: true' and give  wandb sync  later",
        _wandb, _show_wandb, first=lambda place: os.environ.get("WANDB_PROJECT") or place.project,
    ),
    "trackio": Service(
        '"aegpo[trackio]"', "unset the variables TRACKIO_... to keep it on this machine", _trackio, _show_trackio
    ),
    "mlflow": Service(
        '"aegpo[mlflow]"', "set MLFLOW_TRACKING_URI to a server that answers, or 'offline: true'",
        _mlflow, _show_mlflow, begun=_begun_mlflow,
    ),
    "comet_ml": Service("comet-ml", "give  comet login  or set COMET_API_KEY, or 'offline: true'", _comet, _show_comet),
    "aim": Service("aim", _LOCAL, _aim, _show_aim, first=lambda place: place.name, begun=_begun_aim),
    "swanlab": Service("swanlab", "give  swanlab login  or set 'offline: true'", _swanlab, _show_swanlab),
    "clearml": Service(
        "clearml", "give  clearml-init  or set 'offline: true'", _clearml, _show_clearml,
        begun=lambda tracker, place: str(tracker.tracker.id),
    ),
    "dvclive": Service("dvclive", _HALF, _dvclive, _show_dvclive),
}  # fmt: skip


def service_of(name: str) -> Service:
    """The service of a name in accelerate; one that a user registered there gets no arguments of its own."""
    return SERVICES.get(name, OTHER)


def installed(name: str) -> None:
    """Imports the package of a service.

    Raises:
        AegpoError: if it cannot be imported; with the line that installs it.
    """
    if name not in SERVICES:
        return
    try:
        importlib.import_module(name)
    except ImportError as error:
        raise AegpoError(
            f"tracker 'accelerate' with log_with '{name}' needs a package that cannot be imported ({error}); install "
            f"it with  pip install {SERVICES[name].package}  or take the tracker out"
        ) from error
