"""Where pipelines come from, prompts and their cache, and what is said when something is wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from worlds import CPU, asked, small_experiment

from aegpo.core.places import cache_folder
from aegpo.errors import AegpoError
from aegpo.models.flux import FluxSpec
from aegpo.models.sd import SdSpec
from aegpo.models.sd3 import Sd3Spec
from aegpo.models.sdxl import SdxlSpec

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SMALL = {"height": 16, "width": 16, "dtype": "float32"}


@pytest.fixture
def copied(pipeline_folders, tmp_path) -> Path:
    """The sd3 pipeline, to be spoiled."""
    shutil.copytree(pipeline_folders["sd3"], tmp_path / "sd3")
    return tmp_path / "sd3"


@pytest.fixture
def hub(pipeline_folders, tmp_path, monkeypatch) -> Path:
    """A hub cache that holds org/tiny-sd3, and no way out."""
    repository = tmp_path / "hub" / "models--org--tiny-sd3"
    shutil.copytree(pipeline_folders["sd3"], repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return repository


def test_a_hub_id_is_read_from_the_cache_without_a_network(hub, pipeline_folders):
    spec = Sd3Spec(path="org/tiny-sd3", **SMALL)
    model, local = spec.build(CPU), Sd3Spec(path=str(pipeline_folders["sd3"]), **SMALL).build(CPU)
    for one, other in zip(model.policy.parameters(), local.policy.parameters(), strict=True):
        assert torch.equal(one, other)
    assert model.encode(asked(["a red circle"])).text.shape[0] == 1
    assert spec.dimensions == 4 * 8 * 8  # read from the snapshot's config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"path": "org/absent"}, "hub id 'org/absent' is not in the cache, and HF_HUB_OFFLINE is set: it has to be"),
        ({"path": "org/tiny-sd3", "revision": "v2"}, "hub id 'org/tiny-sd3' is not in the cache"),
    ],
)
def test_a_hub_id_that_is_not_in_the_cache_is_an_error_offline(fields, message, hub):
    with pytest.raises(AegpoError, match=message):
        Sd3Spec(**fields).build(CPU)


def test_a_pipeline_of_another_class_on_the_hub_is_an_error(hub):
    with pytest.raises(AegpoError, match="'org/tiny-sd3' holds a StableDiffusion3Pipeline; kind 'sd3' reads that"):
        SdxlSpec(path="org/tiny-sd3").build(CPU)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (
            "/nowhere/at/all",
            "there is no folder '/nowhere/at/all'; 'path' takes a folder that save_pretrained wrote, or",
        ),
        ("./gone", "there is no folder './gone'"),
        (__file__, "is a file; name the folder"),
    ],
)
def test_a_path_that_leads_nowhere_is_an_error_before_and_in_a_run(path, message):
    spec = FluxSpec(path=path)
    with pytest.raises(AegpoError, match=message):
        spec.build(CPU)
    (problem,) = [found for found in small_experiment(spec).problems() if found.location == ("model",)]
    assert message in problem.message


def test_a_folder_that_is_no_pipeline_says_what_is_in_it(tmp_path):
    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(AegpoError, match=r"has no model_index.json but weights.bin; a StableDiffusionPipeline as"):
        SdSpec(path=str(tmp_path)).build(CPU)


def test_a_folder_without_a_pipeline_is_a_problem_of_an_experiment(tmp_path):
    experiment = small_experiment(Sd3Spec(path=str(tmp_path)))
    (problem,) = [found for found in experiment.problems() if found.location == ("model",)]
    assert "has no model_index.json but nothing" in problem.message


@pytest.mark.parametrize(("spec", "held"), [(Sd3Spec, "sdxl"), (SdSpec, "flux"), (FluxSpec, "sd")])
def test_a_folder_with_another_pipeline_names_the_kind_that_reads_it(spec, held, pipeline_folders):
    with pytest.raises(AegpoError, match=f"holds a .*Pipeline; kind {held!r} reads that"):
        spec(path=str(pipeline_folders[held])).build(CPU)


def test_missing_and_extra_weights_are_named(copied):
    file = copied / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    gone = weights.pop("proj_out.weight")
    save_file(weights, file)
    with pytest.raises(AegpoError, match=r"'transformer' of .* lacks weights the config asks for: proj_out.weight"):
        Sd3Spec(path=str(copied), **SMALL).build(CPU)
    save_file(weights | {"proj_out.weight": gone, "surplus.weight": gone.clone()}, file)
    with pytest.raises(AegpoError, match=r"has weights the config has no place for: surplus.weight; save the pipeline"):
        Sd3Spec(path=str(copied), **SMALL).build(CPU)
    save_file(weights | {"proj_out.weight": gone[:1].contiguous()}, file)
    with pytest.raises(AegpoError, match=r"'transformer' of .* cannot be loaded: .*proj_out.weight"):
        Sd3Spec(path=str(copied), **SMALL).build(CPU)


@pytest.mark.parametrize("gone", ["transformer", "vae", "text_encoder_2"])
def test_a_missing_component_is_named(gone, copied):
    shutil.rmtree(copied / gone)
    with pytest.raises(AegpoError, match=gone):
        Sd3Spec(path=str(copied), **SMALL).build(CPU).encode(asked(["a red circle"]))


def test_a_damaged_config_is_named(copied):
    (copied / "scheduler" / "scheduler_config.json").write_text("{")
    with pytest.raises(AegpoError, match=r"scheduler_config.json cannot be read as JSON"):
        Sd3Spec(path=str(copied), **SMALL).sigmas(4)
    experiment = small_experiment(Sd3Spec(path=str(copied), **SMALL))
    assert any("cannot be read as JSON" in problem.message for problem in experiment.problems())


def test_a_variant_that_is_not_there_is_an_error(copied):
    with pytest.raises(AegpoError, match=r"'transformer' of .* cannot be loaded: .*fp16"):
        Sd3Spec(path=str(copied), variant="fp16", **SMALL).build(CPU)


@pytest.mark.parametrize(
    ("kind", "sizes", "message"),
    [
        (Sd3Spec, {"height": 18, "width": 16}, "'height' 18 is no multiple of 4; nearest that are: 16 and 20"),
        (Sd3Spec, {"height": 16, "width": 80}, "'width' 80 is more than the 64 pixels the network has positions for"),
        (FluxSpec, {"height": 16, "width": 3}, "'width' 3 is no multiple of 4; nearest that are: 4"),
        (SdSpec, {"height": 17, "width": 16}, "'height' 17 is no multiple of 2; nearest that are: 16 and 18"),
    ],
)
def test_a_size_the_network_cannot_paint_is_an_error(kind, sizes, message, pipeline_folders):
    spec = kind(path=str(pipeline_folders[kind.model_fields["kind"].default]), **sizes)
    with pytest.raises(AegpoError, match=message):
        spec.build(CPU)
    assert any(message in problem.message for problem in small_experiment(spec).problems())


def test_the_command_line_says_it_in_one_line_and_exits_with_2(pipeline_folders, tmp_path):
    file = tmp_path / "wrong.yaml"
    (tmp_path / "a.txt").write_text("a red circle\n")
    (tmp_path / "b.txt").write_text("a blue circle\n")
    model = {"kind": "sd3", "path": str(pipeline_folders["sdxl"])}
    prompts = {"train": str(tmp_path / "a.txt"), "evaluation": str(tmp_path / "b.txt")}
    parts = {"allocator": "uniform", "selector": "uniform", "tree": "independent", "sampler": "flow-sde"}
    parts |= {"advantage": "group", "objective": "clipped", "rewards": ["palette"]}
    file.write_text(json.dumps({"model": model, "prompts": prompts, **parts}))
    for command in (["check"], ["run", "--out", str(tmp_path / "runs")]):
        words = [sys.executable, "-m", "aegpo", command[0], str(file), *command[1:]]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert "holds a StableDiffusionXLPipeline; kind 'sdxl' reads that" in done.stderr
        assert "Traceback" not in done.stderr


# --- prompts ---------------------------------------------------------------------------------------------------------


def count_encodings(model):
    """How many texts the pipeline's own encoders have read."""
    seen = []
    embed = model._prompts._embed

    def counted(pipeline, texts, device):
        seen.extend(texts)
        return embed(pipeline, texts, device)

    model._prompts._embed = counted
    return seen


@pytest.mark.parametrize("spec", [SdSpec, SdxlSpec, Sd3Spec, FluxSpec])
def test_embeddings_come_from_the_cache_the_second_time(spec, pipeline_folders, tmp_path):
    fields = {"path": str(pipeline_folders[spec.model_fields["kind"].default]), "cache": tmp_path, **SMALL}
    texts = ["a red circle", "two blue squares", "a red circle"]
    first = spec(**fields).build(CPU)
    seen = count_encodings(first)
    cond = first.encode(asked(texts))
    assert seen == ["a red circle", "two blue squares"]
    second = spec(**fields).build(CPU)
    seen = count_encodings(second)
    again = second.encode(asked(texts))
    assert seen == []
    assert torch.equal(cond.text, again.text)
    assert (cond.pooled is None) == (again.pooled is None) == (spec is SdSpec)
    assert torch.equal(cond.text[0], cond.text[2])
    assert not torch.equal(cond.text[0], cond.text[1])


def test_an_embedding_is_anew_for_another_length_dtype_or_checkpoint(copied, tmp_path):
    fields = {"path": str(copied), "cache": tmp_path / "cache", **SMALL}
    texts = ["a red circle"]
    kept = Sd3Spec(**fields).build(CPU).encode(asked(texts))
    for change in ({"max_sequence_length": 20}, {"dtype": "bfloat16"}):
        model = Sd3Spec(**fields | change).build(CPU)
        seen = count_encodings(model)
        assert model.encode(asked(texts)).text.shape[1:] != kept.text.shape[1:] or change == {"dtype": "bfloat16"}
        assert seen == texts
    file = copied / "text_encoder" / "model.safetensors"
    save_file({name: 2 * weight for name, weight in load_file(file).items()}, file, metadata={"format": "pt"})
    assert not torch.equal(Sd3Spec(**fields).build(CPU).encode(asked(texts)).text, kept.text)


def test_a_damaged_file_of_the_cache_is_written_again(pipeline_folders, tmp_path):
    spec = SdSpec(path=str(pipeline_folders["sd"]), cache=tmp_path, guidance=1.0, **SMALL)
    kept = spec.build(CPU).encode(asked(["a red circle"]))
    (file,) = tmp_path.rglob("*.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[:20])
    assert torch.equal(spec.build(CPU).encode(asked(["a red circle"])).text, kept.text)
    assert file.read_bytes() == whole
    assert not list(tmp_path.rglob("*.tmp"))


def test_what_else_an_embedding_has_is_kept_with_it(pipeline_folders, tmp_path):
    texts, spec = ["a red circle", "two"], SdSpec(path=str(pipeline_folders["sd"]), cache=tmp_path, **SMALL)
    model = spec.build(CPU)
    embed = model._prompts._embed

    def measured(pipeline, texts, device):
        return replace(embed(pipeline, texts, device), extra={"letters": torch.tensor([[len(text)] for text in texts])})

    model._prompts._embed = measured
    assert model.encode(asked(texts)).extra["letters"].tolist() == [[12], [3]]
    assert spec.build(CPU).encode(asked([*texts, *texts])).extra["letters"].tolist() == [[12], [3], [12], [3]]


def test_preparing_prompts_leaves_nothing_to_encode(pipeline_folders, tmp_path):
    model = Sd3Spec(path=str(pipeline_folders["sd3"]), cache=tmp_path, **SMALL).build(CPU)
    model.prepare(asked(["a red circle", "two blue squares"]))
    seen = count_encodings(model)
    model.encode(asked(["two blue squares"]))
    assert seen == []


def test_the_cache_folder_is_the_fields_the_projects_or_the_systems(monkeypatch, tmp_path):
    assert cache_folder(tmp_path) == tmp_path
    monkeypatch.setenv("AEGPO_CACHE", "/somewhere")
    assert cache_folder(None) == Path("/somewhere")
    monkeypatch.delenv("AEGPO_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert cache_folder(None) == Path("/cache/aegpo")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder(None) == Path.home() / ".cache" / "aegpo"
