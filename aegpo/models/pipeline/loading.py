"""Loads the components of a pipeline, and says what is wrong with one that does not load."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, OfflineModeIsEnabled
from torch import nn

from aegpo.core.weights import brief, reading_errors
from aegpo.errors import AegpoError
from aegpo.models.pipeline.options import PipelineOptions
from aegpo.models.pipeline.source import INDEX, check_class, check_components, local_folder
from aegpo.prompts.hub import refusal

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pipeline_folder(spec: PipelineOptions) -> Path:
    """The folder of the spec's pipeline, downloaded if it is on the hub, and of the right class.

    Raises:
        AegpoError: if it is not there, cannot be had, or is another pipeline.
    """
    folder = local_folder(spec.kind, spec.path) or _snapshot(spec)
    check_class(spec.kind, spec.path, folder, spec.pipeline_class)
    check_components(spec.kind, spec.path, folder, spec.unneeded)
    return folder


def _snapshot(spec: PipelineOptions) -> Path:
    """The hub's snapshot: model_index.json first, whose absence says best what is wrong, then what it lists."""
    who, revision = f"model {spec.kind!r}: hub id {spec.path!r}", spec.revision
    offline = constants.HF_HUB_OFFLINE
    try:
        index = hf_hub_download(spec.path, INDEX, revision=revision, local_files_only=offline)
        check_class(spec.kind, spec.path, Path(index).parent, spec.pipeline_class)
        return Path(
            diffusers.DiffusionPipeline.download(
                spec.path, revision=revision, variant=spec.variant, local_files_only=offline
            )
        )
    except (HfHubHTTPError, OSError, ValueError, OfflineModeIsEnabled) as error:
        told = refusal(error, spec.path, revision)
        if told is not None:
            raise AegpoError(f"{who} {told}; or give the folder of a saved pipeline as 'path'") from error
        if isinstance(error, EntryNotFoundError):
            raise AegpoError(f"{who} has no {INDEX}; a {spec.pipeline_class} was expected") from error
        raise AegpoError(f"{who} cannot be downloaded: {brief(error)}") from error


def load_component(spec: PipelineOptions, folder: Path, component: str, cls: Any, dtype: str) -> nn.Module:
    """One network of the pipeline, every weight of it from the checkpoint.

    Raises:
        AegpoError: if files are missing, or keys or shapes are not those of the config.
    """
    where = f"model {spec.kind!r}: {component!r} of {spec.path!r}"
    try:
        loaded, info = cls.from_pretrained(
            folder,
            subfolder=component,
            variant=spec.variant,
            dtype=DTYPES[dtype],
            local_files_only=True,
            output_loading_info=True,
        )
    except reading_errors() as error:
        raise AegpoError(f"{where} cannot be loaded: {brief(error)}") from error
    check_keys(where, info)
    network: nn.Module = loaded.requires_grad_(False).eval()
    return network


def check_keys(where: str, info: Mapping[str, Any]) -> None:
    """Every weight is that of the config; `info`: what diffusers says of a network that it loaded.

    Raises:
        AegpoError: if keys or shapes are not those of the config.
    """
    for what, right in (
        ("missing_keys", "lacks weights the config asks for"),
        ("unexpected_keys", "has weights the config has no place for"),
        ("mismatched_keys", "has weights of other shapes than the config's"),
    ):
        keys = [str(key[0] if isinstance(key, tuple) else key) for key in info.get(what, ())]
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            names = ", ".join(sorted(keys)[:3])
            raise AegpoError(f"{where} {right}: {names}{more}; save the pipeline again, or take another 'revision'")


def load_pipeline(spec: PipelineOptions, folder: Path, given: dict[str, nn.Module | None]) -> Any:
    """The diffusers pipeline with `given` in place of components that are there already or are not needed.

    Raises:
        AegpoError: if a component cannot be loaded.
    """
    cls = vars(diffusers).get(spec.pipeline_class) or getattr(diffusers, spec.pipeline_class)
    try:
        pipeline = cls.from_pretrained(
            folder, variant=spec.variant, dtype=DTYPES[spec.dtype], local_files_only=True, **given
        )
    except reading_errors() as error:
        raise AegpoError(f"model {spec.kind!r}: {spec.path!r} cannot be loaded: {brief(error)}") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
