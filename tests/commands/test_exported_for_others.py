"""What `aegpo export` writes, in the hands of programs that do not know aegpo."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from test_sample_and_export import SAMPLERS, TEXTS, policy_of, run, run_of
from worlds import asked

from aegpo.commands.export import ExportRequest, export
from aegpo.core.sections import PolicySpec
from aegpo.errors import AegpoError
from aegpo.models.adapters import add_adapters
from aegpo.models.flux import FluxSpec
from aegpo.models.pipeline.options import PipelineOptions
from aegpo.models.pipeline.packing import pack
from aegpo.models.sd import SdSpec
from aegpo.models.sd3 import Sd3Spec
from aegpo.models.sdxl import SdxlSpec

SPECS = {"sd": SdSpec, "sdxl": SdxlSpec, "sd3": Sd3Spec, "flux": FluxSpec}

# A program of somebody who has diffusers alone. It paints every folder of a list from given start latents.
PAINTS = """
import json, sys
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

noise, images = load_file("noise.safetensors"), {}
for name, call in json.loads(sys.argv[1]).items():
    pipe = DiffusionPipeline.from_pretrained(name)
    images[name] = pipe(latents=noise[name], output_type="pt", **call).images.contiguous()
save_file(images, "images.safetensors")
assert "aegpo" not in sys.modules
"""
# The same for the embedded model, whose parts are loaded one by one, for no pipeline of diffusers has them.
PAINTS_SHAPES = """
import sys
import torch
from diffusers import SD3Transformer2DModel
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, CLIPTextModelWithProjection

transformer = SD3Transformer2DModel.from_pretrained("to", subfolder="transformer")
text_encoder = CLIPTextModelWithProjection.from_pretrained("to", subfolder="text_encoder")
tokenizer = AutoTokenizer.from_pretrained("to", subfolder="tokenizer")
images, steps, longest = load_file("noise.safetensors")["noise"], 4, text_encoder.config.max_position_embeddings
with torch.no_grad():
    words = tokenizer(sys.argv[1:], padding="max_length", max_length=longest, return_tensors="pt").input_ids
    text = text_encoder(words)
    for step in range(steps):
        time = torch.full((len(images),), 1000 * (1 - step / steps))
        images = images - transformer(images, text.last_hidden_state, text.text_embeds, time).sample / steps
save_file({"images": ((images + 1) / 2).clamp(0, 1).contiguous()}, "images.safetensors")
assert "aegpo" not in sys.modules
"""


def paint_elsewhere(folder: Path, program: str, *arguments: str) -> dict[str, torch.Tensor]:
    """Runs a program in a process of its own, below `folder`; the images it saved."""
    hidden = {"PYTHONPATH", "AEGPO_CACHE"}
    environment = {name: value for name, value in os.environ.items() if name not in hidden} | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(folder / "images.safetensors")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, pipeline_folders) -> dict[str, Path]:
    """A run of each kind of pipeline."""
    return {kind: run_of(kind, tmp_path_factory.mktemp(kind), pipeline_folders[kind]) for kind in SAMPLERS}


def small_spec(kind: str, folder: Path, **fields) -> PipelineOptions:
    return SPECS[kind](**{"path": str(folder), "dtype": "float32", "height": 16, "width": 16} | fields)


# --- whole pipelines -------------------------------------------------------------------------------------------------


def call_of(told: str) -> dict[str, object]:
    """The arguments that `export` says a pipeline is called with."""
    line = next(line for line in told.splitlines() if line.startswith("pipe(prompt, "))
    return eval(f"dict({line.removeprefix('pipe(prompt, ')}")


@pytest.mark.slow
def test_a_whole_pipeline_paints_elsewhere_what_aegpo_paints(runs, tmp_path):
    ours, noise, calls = {}, {}, {}
    for kind, trained in runs.items():
        policy = policy_of(trained)
        start = policy.evaluation_noise(asked(TEXTS))
        ours[kind] = policy.images(asked(TEXTS), start)
        noise[kind] = (pack(start) if kind == "flux" else start).contiguous()
        calls[kind] = call_of(export(ExportRequest(trained, tmp_path / kind, full=True))) | {"prompt": list(TEXTS)}
    save_file(noise, tmp_path / "noise.safetensors")
    theirs = paint_elsewhere(tmp_path, PAINTS, json.dumps(calls))
    for kind, images in theirs.items():
        assert float((images - ours[kind]).abs().max()) < 1e-4, kind


@pytest.mark.slow
def test_a_pipeline_in_half_precision_runs_where_no_dtype_is_asked_for(tmp_path, pipeline_folders):
    noise, calls = {}, {}
    for kind in SAMPLERS:
        model = small_spec(kind, pipeline_folders[kind], dtype="bfloat16").build(torch.device("cpu"))
        model.save_pipeline(tmp_path / kind)
        start = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(0))
        noise[kind] = pack(start) if kind == "flux" else start
        calls[kind] = {"prompt": TEXTS[0], "num_inference_steps": 2, "height": model.height, "width": model.width}
    save_file(noise, tmp_path / "noise.safetensors")
    for images in paint_elsewhere(tmp_path, PAINTS, json.dumps(calls)).values():
        assert bool(images.isfinite().all())
        assert float(images.std()) > 0


@pytest.mark.slow
def test_the_embedded_model_is_loaded_elsewhere_part_by_part(tiny_weights, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    counts = "{train_count: 4, evaluation_count: 2}"
    trained = run(folder, f"{{kind: shapes, weights: {tiny_weights}}}", counts, "{train: full}")
    policy = policy_of(trained)
    noise = policy.evaluation_noise(asked(TEXTS))
    export(ExportRequest(trained, tmp_path / "to"))
    save_file({"noise": noise}, tmp_path / "noise.safetensors")
    images = paint_elsewhere(tmp_path, PAINTS_SHAPES, *TEXTS)["images"]
    assert float((images - policy.images(asked(TEXTS), noise)).abs().max()) < 1e-4


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_a_unets_pipeline_is_written_with_the_sampler_it_was_trained_with(kind, runs, tmp_path):
    export(ExportRequest(runs[kind], tmp_path / "to", full=True))
    spec = policy_of(runs[kind]).experiment.model
    again = spec.model_copy(update={"path": str(tmp_path / "to")})
    assert type(diffusers.DiffusionPipeline.from_pretrained(tmp_path / "to").scheduler).__name__ == "DDIMScheduler"
    assert again.schedule() == spec.schedule()
    assert again.sigmas(5).tolist() == spec.sigmas(5).tolist()


def test_what_nothing_reads_may_be_gone_from_the_base(pipeline_folders, tmp_path):
    base = shutil.copytree(pipeline_folders["sd"], tmp_path / "base")
    index = json.loads((base / "model_index.json").read_text())
    checker = {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}
    (base / "model_index.json").write_text(json.dumps(index | checker | {"requires_safety_checker": True}))
    small_spec("sd", base).build(torch.device("cpu")).save_pipeline(tmp_path / "to")
    assert diffusers.DiffusionPipeline.from_pretrained(tmp_path / "to").safety_checker is None


# --- LoRA for ComfyUI ------------------------------------------------------------------------------------------------


def changes(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What each adapted layer's weight is changed by, by the layer's name."""
    adapted = {name: part for name, part in network.named_modules() if isinstance(part, BaseTunerLayer)}
    return {name: part.get_delta_weight(part.active_adapters[0]).detach() for name, part in adapted.items()}


def as_comfyui_reads(file: Path, layers: list[str], prefix: str, joint: str) -> dict[str, torch.Tensor]:
    """alpha / rank * up @ down of every layer, by the rule of comfy/weight_adapter/lora.py; every key is used."""
    saved, found = load_file(file), {}
    for layer in layers:
        name = prefix + layer.replace(".", joint)
        up, down, alpha = (saved.pop(f"{name}.{which}") for which in ("lora_up.weight", "lora_down.weight", "alpha"))
        found[layer] = alpha.item() / down.shape[0] * up @ down
    assert not saved
    return found


NAMES = {
    "sd": ("lora_unet_", "_"),
    "sdxl": ("lora_unet_", "_"),
    "sd3": ("transformer.", "."),
    "flux": ("transformer.", "."),
}


@pytest.mark.parametrize("kind", list(SAMPLERS))
def test_comfyuis_file_has_its_names_and_the_policys_strength(kind, runs, tmp_path):
    told = export(ExportRequest(runs[kind], tmp_path / "to", layout="comfyui"))
    file = tmp_path / "to" / "small-main-seed-0-step-000002.safetensors"
    assert told == f"cp {file} ComfyUI/models/loras/"
    ours = changes(policy_of(runs[kind]).model.policy)
    theirs = as_comfyui_reads(file, list(ours), *NAMES[kind])
    assert any(change.abs().max() > 0 for change in ours.values())
    for layer, change in ours.items():
        assert torch.allclose(theirs[layer], change, atol=1e-7), layer


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_comfyuis_file_of_a_unet_is_what_the_published_converter_makes_of_diffusers_file(kind, runs, tmp_path):
    export(ExportRequest(runs[kind], tmp_path / "to", layout="both"))
    converted = convert_state_dict_to_kohya(load_file(tmp_path / "to" / "pytorch_lora_weights.safetensors"))
    saved = load_file(tmp_path / "to" / "small-main-seed-0-step-000002.safetensors")
    assert saved.keys() == converted.keys()
    assert all(torch.equal(saved[name], converted[name]) for name in saved)


@pytest.mark.parametrize("kind", ["sd", "sdxl", "flux"])  # diffusers has no reader of such a file for SD 3
def test_diffusers_reads_comfyuis_file_back_to_the_same_weights(kind, runs, pipeline_folders, tmp_path):
    export(ExportRequest(runs[kind], tmp_path / "to", layout="both"))
    pipe = diffusers.DiffusionPipeline.from_pretrained(pipeline_folders[kind])
    pipe.load_lora_weights(tmp_path / "to", weight_name="small-main-seed-0-step-000002.safetensors")
    ours = changes(policy_of(runs[kind]).model.policy)
    theirs = changes(pipe.unet if kind.startswith("sd") else pipe.transformer)
    assert theirs.keys() == ours.keys()
    assert all(torch.allclose(theirs[layer], change, atol=1e-7) for layer, change in ours.items())


def test_diffusers_takes_its_own_file_where_there_are_both(runs, tmp_path):
    told = export(ExportRequest(runs["sd3"], tmp_path / "to", layout="both"))
    assert told.splitlines()[0] == f'pipe.load_lora_weights("{tmp_path / "to"}")'
    read = diffusers.StableDiffusion3Pipeline.lora_state_dict(tmp_path / "to")
    assert all(".lora_A." in name or ".lora_B." in name for name in read)


class Unverified(Sd3Spec):
    comfyui_prefix = None


def test_a_kind_whose_names_are_not_known_to_be_comfyuis_is_refused(pipeline_folders, tmp_path):
    model = Unverified(path=str(pipeline_folders["sd3"]), height=16, width=16).build(torch.device("cpu"))
    add_adapters(model.policy, PolicySpec(train="lora", rank=2), model.spec.adapter_targets)
    with pytest.raises(AegpoError, match="'sd3': ComfyUI's names for its layers have not been verified; export the"):
        model.save_for_comfyui(tmp_path / "lora.safetensors")


def test_a_layout_is_of_a_lora(runs, tmp_path):
    with pytest.raises(
        AegpoError, match="--layout comfyui is of a LoRA, and --full asks for the whole pipeline; leave"
    ):
        export(ExportRequest(runs["sd"], tmp_path / "to", full=True, layout="comfyui"))


# --- model cards -----------------------------------------------------------------------------------------------------


def run_code(folder: Path, base: Path) -> dict[str, torch.Tensor]:
    """The images of the code that a card shows, run in its folder by a program that has diffusers alone."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)
    code = code.replace('"BASE"', repr(str(base))).replace(
        "pipe(prompt,", "pipe(prompt, latents=noise, output_type='pt',"
    )
    saves = "save_file({'image': image.contiguous()}, 'images.safetensors')"
    loads = f"prompt, noise = {TEXTS[0]!r}, load_file('noise.safetensors')['noise']"
    return paint_elsewhere(folder, f"from safetensors.torch import load_file, save_file\n{loads}\n{code}\n{saves}\n")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd", "sd3"])
def test_the_code_of_a_card_paints_what_the_policy_paints(kind, runs, pipeline_folders, tmp_path):
    export(ExportRequest(runs[kind], tmp_path / "to", layout="both", card=True))
    policy = policy_of(runs[kind])
    noise = policy.evaluation_noise(asked(TEXTS[:1]))
    save_file({"noise": noise}, tmp_path / "to" / "noise.safetensors")
    image = run_code(tmp_path / "to", pipeline_folders[kind])["image"]
    assert float((image - policy.images(asked(TEXTS[:1]), noise)[0]).abs().max()) < 1e-4


def test_what_is_exported_names_no_place_of_this_machine(runs, pipeline_folders, tmp_path):
    export(ExportRequest(runs["sd3"], tmp_path / "to", full=True, card=True))
    told = [(tmp_path / "to" / name).read_text() for name in ("README.md", "aegpo.json", "model_index.json")]
    assert all(str(pipeline_folders["sd3"].parent) not in text for text in told)
    assert json.loads(told[1])["model"]["path"] == "sd3"
    for config in (tmp_path / "to").rglob("*.json"):
        assert str(pipeline_folders["sd3"].parent) not in config.read_text(), config


def test_the_card_of_the_embedded_model_says_how_aegpo_loads_it(tiny_weights, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    counts = "{train_count: 4, evaluation_count: 2}"
    trained = run(folder, f"{{kind: shapes, weights: {tiny_weights}}}", counts, "{train: full}")
    told = export(ExportRequest(trained, tmp_path / "to", card=True))
    assert told == f"model: {{kind: shapes, weights: {tmp_path / 'to'}}}"
    card = (tmp_path / "to" / "README.md").read_text()
    assert "library_name: aegpo\n" in card
    assert "model: {kind: shapes, weights: .}" in card
