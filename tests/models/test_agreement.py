"""Our deterministic sampler paints what diffusers' own pipelines paint, from the same latents."""

from __future__ import annotations

import json

import diffusers
import pipelines
import pytest
import torch
from worlds import CPU, asked, execution

from aegpo.models.flux import FluxSpec
from aegpo.models.pipeline.packing import pack
from aegpo.models.sd import SdSpec
from aegpo.models.sd3 import Sd3Spec
from aegpo.models.sdxl import SdxlSpec
from aegpo.train.rollouts import sample_deterministic

SPECS = {"sd": SdSpec, "sdxl": SdxlSpec, "sd3": Sd3Spec, "flux": FluxSpec}
TEXTS = ["a red circle on the left", "two blue squares"]
SIZES = [(16, 16), (24, 32)]
STEPS = 5
CLOSE = 1e-4


def ours(spec, noise, steps=STEPS):
    model = spec.build(CPU)
    return sample_deterministic(execution(model, steps), noise, model.encode(asked(TEXTS)))


def theirs(kind, folder, noise, steps=STEPS, change=None, texts=TEXTS, **options):
    pipeline = getattr(diffusers, SPECS[kind].pipeline_class).from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    if kind in ("sd", "sdxl"):
        pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    if change is not None:
        change(pipeline)
    height, width = (pipelines.SCALE * side for side in noise.shape[-2:])
    latents = pack(noise) if kind == "flux" else noise.clone()
    given = {"latents": latents, "height": height, "width": width, "num_inference_steps": steps, "output_type": "pt"}
    return pipeline(texts, **given, **options).images


def start(height, width, seed=0):
    shape = (len(TEXTS), 4, height // pipelines.SCALE, width // pipelines.SCALE)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_agree(spec, folder, steps=STEPS, **options):
    noise = start(spec.height, spec.width)
    images = ours(spec, noise, steps)
    expected = theirs(spec.kind, folder, noise, steps, **options)
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


def test_images_of_schnell_are_the_pipelines_own(tmp_path):
    """No guidance embedding and no shift."""
    folder = pipelines.write_flux(tmp_path, guidance_embeds=False, dynamic_shift=False)
    assert_agree(FluxSpec(path=str(folder), dtype="float32", height=16, width=24), folder, guidance_scale=0.0)


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3"])
def test_a_negative_prompt_steers_as_in_the_pipeline(kind, pipeline_folders):
    folder = pipeline_folders[kind]
    sizes = {"height": 16, "width": 16}
    spec = SPECS[kind](path=str(folder), dtype="float32", guidance=3.0, negative_prompt="green square", **sizes)
    assert_agree(spec, folder, guidance_scale=3.0, negative_prompt=["green square"] * len(TEXTS))
    other = spec.model_copy(update={"negative_prompt": None})
    assert float((ours(spec, start(16, 16)) - ours(other, start(16, 16))).abs().max()) > CLOSE


@pytest.mark.parametrize("gradient", ["both", "conditional"])
def test_images_do_not_depend_on_which_evaluation_learns(gradient, pipeline_folders):
    folder = pipeline_folders["sd3"]
    sizes = {"height": 16, "width": 16}
    spec = Sd3Spec(path=str(folder), dtype="float32", guidance=4.0, guidance_gradient=gradient, **sizes)
    assert_agree(spec, folder, guidance_scale=4.0)


@pytest.mark.parametrize(
    ("steps", "settings"),
    [
        (4, {"prediction_type": "v_prediction"}),
        (4, {"set_alpha_to_one": True}),
        (7, {"steps_offset": 0}),
        (5, {"timestep_spacing": "trailing"}),
        (6, {"beta_schedule": "linear"}),
    ],
    ids=str,
)
def test_every_noise_schedule_of_ddim_is_walked_as_diffusers_walks_it(steps, settings, tmp_path):
    folder = pipelines.write_sd(tmp_path)
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | settings))
    spec = SdSpec(path=str(folder), dtype="float32", height=16, width=16, guidance=2.0)
    assert_agree(spec, folder, steps, guidance_scale=2.0)
