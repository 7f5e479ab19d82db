"""What a run has learned: painted beside its base, and written so that others load the same policy."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import pytest
import torch
from PIL import Image
from worlds import CPU, asked, execution

from aegpo.commands.export import ExportRequest, export
from aegpo.commands.launch_request import LaunchRequest
from aegpo.commands.run import launch
from aegpo.commands.sample import SampleRequest, sample
from aegpo.errors import AegpoError, CheckpointError
from aegpo.models.pipeline.packing import pack
from aegpo.models.shapes import ShapesSpec
from aegpo.plugin.manager import load_registries, plugin_manager
from aegpo.runs.checkpoints import load_step
from aegpo.runs.opening import find_run
from aegpo.train.policy import Policy
from aegpo.train.rollouts import sample_deterministic

TEXTS = ("two red circles on a green background", "four blue squares on a red background")
SMALL = """
training_steps: 2
device: cpu
rewards: [palette]
rollouts: {prompts_per_step: 2, rollouts_per_step: 4, denoising_steps: 4}
allocator: uniform
selector: uniform
tree: independent
advantage: group
objective: clipped
optimizer: {learning_rate: 0.03}
checkpoint: {every: 1}
evaluation: {images: 2}
"""


def run(folder: Path, model: str, prompts: str, policy: str, sampler: str = "flow-sde") -> Path:
    """Two training steps of a small model; the run's folder."""
    path = folder / "small.yaml"
    chosen = f"model: {model}\nprompts: {prompts}\npolicy: {policy}\nsampler: {sampler}\n"
    path.write_text(f"name: small\n{SMALL}{chosen}")
    assert launch(LaunchRequest(path, out=folder, report=False)) == 0
    return folder / "small" / "main" / "seed-0"


@pytest.fixture(scope="module")
def shapes_run(tmp_path_factory, tiny_weights) -> Path:
    folder, counts = tmp_path_factory.mktemp("shapes"), "{train_count: 4, evaluation_count: 2}"
    return run(folder, f"{{kind: shapes, weights: {tiny_weights}}}", counts, "{train: full, ema: 0.5}")


def policy_of(folder: Path) -> Policy:
    found = find_run(folder, load_registries(plugin_manager()))
    policy = Policy(found.experiment)
    policy.weights.take(found.weights(), found.where)
    return policy


def test_the_policy_and_the_base_are_painted_side_by_side(shapes_run, tmp_path):
    out = sample(SampleRequest(shapes_run, ("two red circles", "a blue square"), out=tmp_path / "out"))
    for number in range(2):
        base, policy = (Image.open(out / name / f"{number:05d}.png") for name in ("base", "policy"))
        assert base.size == policy.size == (24, 24)
        assert base.tobytes() != policy.tobytes()
    sheet = Image.open(out / "grid.png")
    assert sheet.width > 2 * 160
    assert sheet.height > 2 * 160
    assert json.loads((out / "samples.json").read_text())["prompts"] == ["two red circles", "a blue square"]


def test_the_base_is_what_it_was_before_training_and_a_seed_gives_the_same_pictures_again(shapes_run, tmp_path):
    first = sample(SampleRequest(shapes_run, ("a blue square",), out=tmp_path / "first", checkpoint=1))
    again = sample(SampleRequest(shapes_run, ("a blue square",), out=tmp_path / "again", checkpoint=2))
    other = sample(SampleRequest(shapes_run, ("a blue square",), out=tmp_path / "other", seed=1))

    def picture(folder, name):
        return (folder / name / "00000.png").read_bytes()

    assert picture(first, "base") == picture(again, "base") != picture(other, "base")
    assert picture(first, "policy") != picture(again, "policy")


def test_the_averaged_weights_are_taken_where_the_run_keeps_them(shapes_run):
    found = find_run(shapes_run, load_registries(plugin_manager()))
    policy = policy_of(shapes_run)
    saved = load_step(shapes_run / "checkpoints", found.step).tensors
    for name, weight in policy.model.policy.named_parameters():
        assert torch.equal(weight, saved[f"ema/{name}"])
    assert any(not torch.equal(saved[key], saved["policy/" + key[4:]]) for key in saved if key.startswith("ema/"))


def test_an_exported_embedded_model_is_the_policy(shapes_run, tmp_path):
    export(ExportRequest(shapes_run, tmp_path / "to"))
    again = ShapesSpec(weights=tmp_path / "to").build(CPU)
    network = policy_of(shapes_run).model.policy
    for name, weight in again.policy.named_parameters():
        assert torch.equal(weight, network.get_parameter(name))
    with pytest.raises(AegpoError, match="is there already, and nothing is overwritten"):
        export(ExportRequest(shapes_run, tmp_path / "to"))


SAMPLERS = {"sd": "ddim", "sdxl": "ddim", "sd3": "flow-sde", "flux": "flow-sde"}


@pytest.fixture(scope="module", params=list(SAMPLERS))
def lora_run(request, tmp_path_factory, pipeline_folders) -> Path:
    return run_of(request.param, tmp_path_factory.mktemp("lora"), pipeline_folders[request.param])


def run_of(kind: str, folder: Path, pipeline: Path, **model) -> Path:
    """A run of one kind of pipeline with LoRA; the run's folder."""
    (folder / "train.txt").write_text("\n".join(TEXTS))
    (folder / "held.txt").write_text("two green circles on a red background\na blue square on a red background")
    guidance = {} if kind == "flux" else {"guidance": 2.0}  # FLUX has its own in the network
    fields = {"kind": kind, "path": str(pipeline), "dtype": "float32", "height": 24, "width": 24, **guidance, **model}
    prompts = f"{{train: {folder / 'train.txt'}, evaluation: {folder / 'held.txt'}}}"
    return run(folder, json.dumps(fields), prompts, "{train: lora, rank: 2, alpha: 4}", SAMPLERS[kind])


def test_diffusers_paints_with_the_exported_lora_what_the_policy_paints(lora_run, pipeline_folders, tmp_path):
    policy = policy_of(lora_run)
    noise = policy.evaluation_noise(asked(TEXTS))
    how = policy.painting(4)
    ours = policy.images(asked(TEXTS), noise, how)
    with policy.base():
        base = policy.images(asked(TEXTS), noise, how)
    assert float((ours - base).abs().max()) > 1e-2
    export(ExportRequest(lora_run, tmp_path / "lora"))
    spec = policy.experiment.model
    pipe = diffusers.DiffusionPipeline.from_pretrained(pipeline_folders[spec.kind])
    pipe.load_lora_weights(tmp_path / "lora")
    theirs = painted(pipe, spec.kind, noise)
    assert float((ours - theirs).abs().max()) < 1e-4
    export(ExportRequest(lora_run, tmp_path / "full", full=True))
    model = spec.model_copy(update={"path": str(tmp_path / "full")}).build(CPU)
    again = sample_deterministic(execution(model, 4), noise, model.encode(asked(TEXTS)))
    assert float((ours - again).abs().max()) < 1e-4


def painted(pipe, kind, noise):
    """What a user of diffusers gets from the same start latents."""
    pipe.set_progress_bar_config(disable=True)
    options = {"height": 24, "width": 24, "num_inference_steps": 4, "output_type": "pt"}
    if kind == "flux":
        return pipe(list(TEXTS), latents=pack(noise), guidance_scale=3.5, **options).images
    if kind != "sd3":
        pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    return pipe(list(TEXTS), latents=noise.clone(), guidance_scale=2.0, **options).images


def test_what_is_not_there_is_said(shapes_run, tmp_path):
    registries = load_registries(plugin_manager())
    with pytest.raises(AegpoError, match=r"there is no folder .*: a run has a manifest.json"):
        find_run(tmp_path / "nope", registries)
    with pytest.raises(AegpoError, match="is not the folder of a run"):
        find_run(tmp_path, registries)
    with pytest.raises(CheckpointError, match="has no checkpoint of step 7; those there are: 1, 2"):
        find_run(shapes_run, registries, checkpoint=7)
    with pytest.raises(AegpoError, match="there is nothing to paint; give --prompt TEXT"):
        sample(SampleRequest(shapes_run, out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()
