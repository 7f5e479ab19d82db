"""How an exported policy is loaded, in words of the terminal and of its model card."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeGuard

from aegpo.commands.options import Layout
from aegpo.core.parts import ModelSpec
from aegpo.core.places import named_places
from aegpo.models.pipeline.options import PipelineOptions
from aegpo.runs.opening import FoundRun

HERE = '"."'  # in a card: the folder it is in
_HERE = "  # this folder, or the id of its repository"


def comfyui_file(run: FoundRun) -> str:
    """The name of a LoRA among those of ComfyUI; diffusers does not take it for its own file."""
    return f"{run.experiment.name}-{run.arm}-seed-{run.seed}-step-{run.step:06d}.safetensors"


def is_pipeline(spec: ModelSpec) -> TypeGuard[PipelineOptions]:
    """True if diffusers loads what the model writes."""
    return isinstance(spec, PipelineOptions)


def how_to_load(run: FoundRun, folder: Path, whole: bool, layout: Layout) -> list[str]:
    """A line for each way to load what was written, and how it is called to paint as the run's evaluations did."""
    spec = run.experiment.model
    if not whole:
        lora = [f'pipe.load_lora_weights("{folder}")'] if layout != "comfyui" else []
        return lora + ([f"cp {folder / comfyui_file(run)} ComfyUI/models/loras/"] if layout != "diffusers" else [])
    if not is_pipeline(spec):
        return [_again(spec, str(folder))]
    return [f'DiffusionPipeline.from_pretrained("{folder}"), or  {_again(spec, str(folder))}', _call(run, spec)]


def in_markdown(run: FoundRun, whole: bool, layout: Layout) -> str:
    """The same for a model card, which lies in the folder."""
    spec = run.experiment.model
    blocks = []
    if is_pipeline(spec) and (whole or layout != "comfyui"):
        blocks.append("\n".join(("```python", *_python(run, spec, whole), "```")))
    elif whole:
        blocks.append(f"In an experiment file of aegpo:\n\n```yaml\n{_again(spec, '.')}\n```")
    if not whole and layout != "diffusers":
        blocks.append(f"ComfyUI: `{comfyui_file(run)}` goes into its folder `models/loras`.")
    return "\n\n".join(blocks)


def without_places(spec: ModelSpec) -> dict[str, Any]:
    """A model's settings with the places of this machine by their last name alone, since they may be published."""
    told = spec.model_dump(mode="json")
    for place in named_places(type(spec), told):
        if Path(place.text).is_absolute() and len(place.location) == 1:
            told[str(place.location[0])] = Path(place.text).name
    return told


def _again(spec: ModelSpec, folder: str) -> str:
    """The model in an experiment file."""
    return f"model: {{kind: {spec.kind}, {'path' if is_pipeline(spec) else 'weights'}: {folder}}}"


def _python(run: FoundRun, spec: PipelineOptions, whole: bool) -> list[str]:
    """A whole pipeline, or the base with the LoRA in it and the sampler it was trained with; and how it paints."""
    names, paint = ["DiffusionPipeline"], f"image = {_call(run, spec)}.images[0]"
    if whole:
        lines = [f"pipe = DiffusionPipeline.from_pretrained({HERE}){_HERE}"]
    else:
        base, scheduler = run.base or {}, spec.saved_scheduler()
        where = f'"{base["hub"]}", revision="{base["commit"]}"' if "hub" in base else '"BASE"'
        lines = [f"pipe = DiffusionPipeline.from_pretrained({where})", f"pipe.load_lora_weights({HERE}){_HERE}"]
        if scheduler is not None:
            names.insert(0, type(scheduler).__name__)
            lines.append(f"pipe.scheduler = {names[0]}.from_config(pipe.scheduler.config, clip_sample=False)")
    return [f"from diffusers import {', '.join(names)}", "", *lines, paint]


def _call(run: FoundRun, spec: PipelineOptions) -> str:
    evaluation = run.experiment.evaluation
    steps = evaluation.denoising_steps or run.experiment.rollouts.denoising_steps
    told = spec.call_arguments(steps, evaluation.height or spec.height, evaluation.width or spec.width)
    return f"pipe(prompt, {', '.join(f'{name}={value!r}' for name, value in told.items())})"
