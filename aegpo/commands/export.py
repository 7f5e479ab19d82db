"""`aegpo export`: a run's policy as files that other programs load."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from aegpo.commands.telling import tell_missing
from aegpo.core.files import whole_folder, write_json
from aegpo.core.interfaces import Exportable
from aegpo.core.processes import refuse_several_processes
from aegpo.errors import AegpoError
from aegpo.plugin.manager import load_registries, plugin_manager
from aegpo.runs.manifest import read_manifest
from aegpo.runs.opening import FoundRun, find_run

if TYPE_CHECKING:
    from aegpo.train.policy import Policy


@dataclass(frozen=True)
class ExportRequest:
    """What the command line asked for."""

    run: Path
    to: Path
    checkpoint: int | None = None  # None: the newest
    full: bool = False  # the whole pipeline, even if only a LoRA was trained
    plugins: tuple[str, ...] = ()


def export(request: ExportRequest) -> str:
    """Writes the policy; the folder is whole or absent.

    Returns:
        How what was written is loaded.

    Raises:
        AegpoError: if there is no such run, the folder cannot be made, or the model cannot be written.
    """
    refuse_several_processes()
    registries = load_registries(plugin_manager(request.plugins))
    run = find_run(request.run, registries, request.checkpoint, only_policy=True)
    tell_missing(run.missing)

    from aegpo.train.policy import Policy

    with whole_folder(request.to, "--to") as folder:
        policy = Policy(run.experiment)
        policy.weights.take(run.weights(), run.where)
        whole = request.full or run.experiment.policy.train == "full"
        _write(policy, run, whole, folder)
    return _how_to_load(policy, request.to, whole)


def _write(policy: Policy, run: FoundRun, whole: bool, folder: Path) -> None:
    from safetensors import SafetensorError

    model, kind = policy.model, run.experiment.model.kind
    if not isinstance(model, Exportable):
        raise AegpoError(
            f"model {kind!r} cannot be exported: it has no save_adapters(folder) and save_pipeline(folder); the "
            f"trained weights by name are in {run.folder / 'checkpoints'}, as safetensors"
        )
    try:
        if whole:
            model.save_pipeline(folder)
        else:
            model.save_adapters(folder)
    except SafetensorError as error:  # how safetensors tells a full disk
        raise AegpoError(
            f"the weights cannot be written to {folder.parent}: {error}; nothing was kept: make room, or choose "
            "another folder with --to"
        ) from error
    write_json(
        folder / "aegpo.json",
        {
            "model": run.experiment.model.model_dump(mode="json"),
            "what": "pipeline" if whole else "lora",
            "experiment": run.experiment.name,
            "arm": run.arm,
            "seed": run.seed,
            "step": run.step,
            "versions": read_manifest(run.folder)["versions"],
        },
    )


def _how_to_load(policy: Policy, folder: Path, whole: bool) -> str:
    model = policy.experiment.model
    if model.kind == "shapes":
        return f"model: {{kind: shapes, weights: {folder}}}"
    again = f"model: {{kind: {model.kind}, path: {folder}}}"
    return (
        f'DiffusionPipeline.from_pretrained("{folder}"), or  {again}'
        if whole
        else f'pipe.load_lora_weights("{folder}")'
    )
