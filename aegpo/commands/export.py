"""`aegpo export`: a run's policy as files that other programs load."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from aegpo.commands.exported_use import comfyui_file, how_to_load, in_markdown, is_pipeline, without_places
from aegpo.commands.options import Layout
from aegpo.commands.telling import tell_missing
from aegpo.core.exporting import Exportable, ExportableToComfyui
from aegpo.core.files import whole_folder, write_json
from aegpo.core.processes import refuse_several_processes
from aegpo.errors import AegpoError
from aegpo.plugin.manager import load_registries, plugin_manager
from aegpo.runs.manifest import read_manifest
from aegpo.runs.opening import FoundRun, find_run

if TYPE_CHECKING:
    from aegpo.train.policy import Policy

EXPORTED = "aegpo.json"  # what the folder holds, and of which run


@dataclass(frozen=True)
class ExportRequest:
    """What the command line asked for."""

    run: Path
    to: Path
    checkpoint: int | None = None  # None: the newest
    full: bool = False  # the whole pipeline, even if only a LoRA was trained
    plugins: tuple[str, ...] = ()
    layout: Layout = "diffusers"  # of a LoRA
    card: bool = False  # a model card beside it


def export(request: ExportRequest) -> str:
    """Writes the policy; the folder is whole or absent.

    Returns:
        How what was written is loaded, a line each way.

    Raises:
        AegpoError: if there is no such run, the folder cannot be made, or the model cannot be written.
    """
    refuse_several_processes()
    registries = load_registries(plugin_manager(request.plugins))
    run = find_run(request.run, registries, request.checkpoint, only_policy=True)
    tell_missing(run.missing)
    whole = request.full or run.experiment.policy.train == "full"
    if whole and request.layout != "diffusers":
        why = "--full asks for" if request.full else "the policy was fine-tuned in full, so there is"
        raise AegpoError(f"--layout {request.layout} is of a LoRA, and {why} the whole pipeline; leave out --layout")

    from aegpo.train.policy import Policy

    with whole_folder(request.to, "--to") as folder:
        policy = Policy(run.experiment)
        policy.weights.take(run.weights(), run.where)
        _write(policy, run, whole, request.layout, folder)
        if request.card:
            _write_card(run, whole, request.layout, folder)
    return "\n".join(how_to_load(run, request.to, whole, request.layout))


def _write_card(run: FoundRun, whole: bool, layout: Layout, folder: Path) -> None:
    from aegpo.report.card import write_card
    from aegpo.report.card_text import Exported

    spec = run.experiment.model
    library = "diffusers" if is_pipeline(spec) else "aegpo"
    use, video = in_markdown(run, whole, layout), spec.media == "video"
    write_card(Exported(run.folder, run.arm, run.seed, run.step, whole, library, use, spec.base_folder, video), folder)


def _write(policy: Policy, run: FoundRun, whole: bool, layout: Layout, folder: Path) -> None:
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
        if not whole and layout != "comfyui":
            model.save_adapters(folder)
        if layout != "diffusers":
            if not isinstance(model, ExportableToComfyui):
                raise AegpoError(f"model {kind!r} has no LoRA for ComfyUI; leave out --layout {layout}")
            model.save_for_comfyui(folder / comfyui_file(run))
    except SafetensorError as error:  # how safetensors tells a full disk
        raise AegpoError(
            f"the weights cannot be written to {folder.parent}: {error}; nothing was kept: make room, or choose "
            "another folder with --to"
        ) from error
    write_json(
        folder / EXPORTED,
        {
            "model": without_places(run.experiment.model),
            "what": "pipeline" if whole else "lora",
            "experiment": run.experiment.name,
            "arm": run.arm,
            "seed": run.seed,
            "step": run.step,
            "versions": read_manifest(run.folder)["versions"],
        },
    )
