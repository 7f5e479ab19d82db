"""Our deterministic sampler paints what diffusers' own pipelines paint, from the same latents."""

from __future__ import annotations

import diffusers
import pipelines
import pytest
import torch
from worlds import CPU, execution

from aegpo.models.flux import FluxSpec
from aegpo.models.flux.model import pack
from aegpo.models.sd import SdSpec
from aegpo.models.sd3 import Sd3Spec
from aegpo.models.sdxl import SdxlSpec
from aegpo.rollouts import sample_deterministic

SPECS = {"sd": SdSpec, "sdxl": SdxlSpec, "sd3": Sd3Spec, "flux": FluxSpec}
TEXTS = ["a red circle on the left", "two blue squares"]
SIZES = [(16, 16), (24, 32)]
STEPS = 5
CLOSE = 1e-4


def ours(spec, noise, steps=STEPS):
    model = spec.build(CPU)
    return sample_deterministic(execution(model, steps), noise, model.encode(TEXTS))


def theirs(kind, folder, noise, steps=STEPS, scheduler=None, **options):
    pipeline = getattr(diffusers, SPECS[kind].pipeline_class).from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    if kind in ("sd", "sdxl"):
        config = pipeline.scheduler.config | (scheduler or {})
        pipeline.scheduler = diffusers.DDIMScheduler.from_config(config, clip_sample=False)
    height, width = (pipelines.SCALE * side for side in noise.shape[-2:])
    latents = pack(noise) if kind == "flux" else noise.clone()
    given = {"latents": latents, "height": height, "width": width, "num_inference_steps": steps, "output_type": "pt"}
    return pipeline(TEXTS, **given, **options).images


def start(height, width, seed=0):
    shape = (len(TEXTS), 4, height // pipelines.SCALE, width // pipelines.SCALE)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_agree(spec, folder, steps=STEPS, scheduler=None, **options):
    noise = start(spec.height, spec.width)
    images = ours(spec, noise, steps)
    expected = theirs(spec.kind, folder, noise, steps, scheduler, **options)
    assert images.shape == expected.shape == (len(TEXTS), 3, spec.height, spec.width)
    assert float(expected.std()) > 0.05
    assert float((images - expected).abs().max()) < CLOSE


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3"])
def test_images_are_the_pipelines_own(kind, guidance, height, width, pipeline_folders):
    folder = pipeline_folders[kind]
    spec = SPECS[kind](path=str(folder), dtype="float32", height=height, width=width, guidance=guidance)
    assert_agree(spec, folder, guidance_scale=guidance)


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("true_guidance", [1.0, 3.0])
def test_images_of_flux_are_the_pipelines_own(true_guidance, height, width, pipeline_folders):
    folder = pipeline_folders["flux"]
    sizes = {"height": height, "width": width}
    spec = FluxSpec(path=str(folder), dtype="float32", guidance=2.5, true_guidance=true_guidance, **sizes)
    options = {"guidance_scale": 2.5, "true_cfg_scale": true_guidance, "negative_prompt": [""] * len(TEXTS)}
    assert_agree(spec, folder, **options)
