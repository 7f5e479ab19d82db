"""What the model promises the engine: prompts, attention, base policy, memory, and what is said of bad input."""

from __future__ import annotations

import gc
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from aegpo_qwen_image import QwenImageSpec
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from small_qwen_image import PROMPTS, TEXTS, WIDTH, our_images, start, write_qwen_image
from transformers import Qwen2_5_VLForConditionalGeneration

from aegpo import AegpoError, Exportable, PolicySpec, Preparable, Resizable
from aegpo.testing import adapt, attention_entropies, check_installed, check_model, load_arms

CPU = torch.device("cpu")
EXAMPLE = Path(__file__).parents[1] / "qwen_image_aegpo.yaml"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
SIGMA = torch.tensor([0.8, 0.5])
LORA = PolicySpec(train="lora", rank=2)


def spec_of(folder, **fields) -> QwenImageSpec:
    return QwenImageSpec(**{"path": str(folder), "dtype": "float32", "height": 16, "width": 16} | fields)


def evaluate(model, prompts=PROMPTS):
    return model.velocity(start(model), SIGMA, model.encode(prompts))


def experiment_of(spec, **changes):
    """The example's arm `aegpo`, with another model."""
    return load_arms(EXAMPLE)["aegpo"].model_copy(update={"model": spec, **changes})


@pytest.fixture
def copied(folder, tmp_path) -> Path:
    """The pipeline, to be spoiled."""
    shutil.copytree(folder, tmp_path / "copy")
    return tmp_path / "copy"


def test_it_is_found_through_its_entry_point():
    check_installed(QwenImageSpec, "aegpo-qwen-image")


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_it_conforms(guidance, folder):
    spec = spec_of(folder, width=24, guidance=guidance)
    check_model(spec, TEXTS)
    assert all(isinstance(spec.build(CPU), protocol) for protocol in (Preparable, Resizable, Exportable))


# --- prompts and padding ---------------------------------------------------------------------------------------------


def test_unequal_prompts_are_padded_in_a_batch_and_kept_without_padding(folder, tmp_path):
    model = spec_of(folder, cache=tmp_path, guidance=1.0).build(CPU)
    cond = model.encode(PROMPTS)
    lengths = [len(text.split()) + 5 for text in TEXTS]  # and the template's end
    assert cond.text.shape == (2, max(lengths), WIDTH)
    assert cond.mask.sum(dim=1).tolist() == lengths
    assert not cond.text[1, lengths[1] :].any()
    alone = model.encode(PROMPTS[1:])
    assert alone.mask is None
    assert torch.equal(alone.text[0], cond.text[1, : lengths[1]])
    kept = sorted(load_file(file)["text"].shape[1] for file in tmp_path.rglob("*.safetensors"))
    assert kept == sorted(lengths)


def test_padding_is_not_seen(folder):
    model = spec_of(folder, guidance=1.0).build(CPU)
    cond = model.encode(PROMPTS)
    with torch.no_grad():
        batch = model.velocity(start(model), SIGMA, cond)
        alone = model.velocity(start(model)[1:], SIGMA[1:], model.encode(PROMPTS[1:]))
        noise = torch.where(cond.mask[..., None], cond.text, torch.full_like(cond.text, 3.0))
        filled = model.velocity(start(model), SIGMA, replace(cond, text=noise))
        seen = model.velocity(start(model), SIGMA, replace(cond, mask=None))
    assert torch.allclose(batch[1:], alone, atol=1e-6)
    assert torch.allclose(batch, filled, atol=1e-6)
    assert float((seen[1] - batch[1]).abs().max()) > 1e-4


def test_embeddings_come_from_the_cache_the_second_time_and_the_encoder_is_freed(folder, tmp_path):
    def encoders():
        gc.collect()
        return {id(each) for each in gc.get_objects() if type(each) is Qwen2_5_VLForConditionalGeneration}

    before, spec = encoders(), spec_of(folder, cache=tmp_path)
    cond = spec.build(CPU).encode([*PROMPTS, PROMPTS[0]])
    assert encoders() <= before
    written = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")}
    assert len(written) == 3  # two prompts and the absence of one
    again = spec.build(CPU).encode(PROMPTS)
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")} == written
    assert torch.equal(again.text, cond.text[:2])
    spec_of(folder, cache=tmp_path, negative_prompt="green cube").build(CPU)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 4


# --- attention -------------------------------------------------------------------------------------------------------


def measured(model, texts, which=slice(None), rows=None):
    """Entropy (B,) of each block of the given texts and their start noises."""
    return attention_entropies(model, texts, start(model)[which], SIGMA[which], rows)


def test_a_tap_sees_every_attention_once_for_each_evaluation(folder):
    model, calls = spec_of(folder, guidance=2.0).build(CPU), []
    with torch.no_grad(), model.tap_attention(calls.append):
        evaluate(model)
    assert [call.layer for call in calls] == [f"transformer_blocks.{layer}.attn" for layer in (0, 1)] * 2
    for call in calls:
        assert call.kind == "joint"
        assert call.image.stop - call.image.start == 16
        assert call.image.start == call.text.stop


@pytest.mark.parametrize("rows", [None, 9])
def test_entropy_is_that_of_the_prompt_alone_whatever_it_is_padded_to(rows, folder):
    model = spec_of(folder, guidance=1.0).build(CPU)
    batch, alone = measured(model, TEXTS, rows=rows), measured(model, TEXTS[1:], slice(1, 2), rows)
    assert set(batch) == {"joint", "image-image", "image-text", "text-image", "text-text"}
    for block, values in alone.items():
        assert torch.allclose(batch[block][1:], values, atol=1e-5)
        assert (values > 0).all()


# --- the policy ------------------------------------------------------------------------------------------------------


def test_the_base_is_the_network_without_its_adapters(folder):
    model = spec_of(folder).build(CPU)
    with torch.no_grad():
        before = evaluate(model)
        adapt(model, model.spec.adapter_targets)
        assert float((evaluate(model) - before).abs().max()) > 1e-3
        with model.frozen("base"):
            assert torch.equal(evaluate(model), before)


def test_adapters_sit_on_attention_and_feed_forward_of_image_and_words(folder):
    model = spec_of(folder).build(CPU)
    adapt(model, model.spec.adapter_targets, disturbed=False)
    adapted = {name.split(".lora_")[0] for name, weight in model.policy.named_parameters() if weight.requires_grad}
    places = [f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")]
    places += [f"attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")]
    places += [f"{stream}_mlp.net.{end}" for stream in ("img", "txt") for end in ("0.proj", "2")]
    assert adapted == {f"transformer_blocks.{layer}.{place}" for layer in (0, 1) for place in places}


@pytest.mark.parametrize("guidance_gradient", ["both", "conditional"])
def test_gradient_checkpointing_changes_no_gradient(guidance_gradient, folder):
    gradients = []
    for checkpointing in (False, True):
        fields = {"gradient_checkpointing": checkpointing, "guidance_gradient": guidance_gradient}
        model = spec_of(folder, guidance=3.0, **fields).build(CPU)
        adapt(model, model.spec.adapter_targets)
        evaluate(model).square().mean().backward()
        gradients.append([weight.grad for weight in model.policy.parameters() if weight.requires_grad])
    trained = [pair for pair in zip(*gradients, strict=True) if pair[0] is not None]
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in trained)
    assert any(float(one.abs().max()) > 0 for one, _ in trained)


def test_bfloat16_weights_give_float32_velocities_close_to_those_of_float32(folder):
    with torch.no_grad():
        exact = evaluate(spec_of(folder, guidance=1.0).build(CPU))
        model = spec_of(folder, dtype="bfloat16", guidance=1.0).build(CPU)
        adapt(model, model.spec.adapter_targets, disturbed=False)
        rough = evaluate(model)
    assert rough.dtype == torch.float32
    assert 0 < float((rough - exact).abs().max()) < 0.1 * float(exact.abs().max())
    dtypes = {("lora_" in name, weight.dtype) for name, weight in model.policy.named_parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}


def test_the_same_network_paints_other_sizes(folder):
    model, wide = spec_of(folder).build(CPU), spec_of(folder, width=32).build(CPU)
    other = model.at(16, 32)
    assert other.policy is model.policy
    assert torch.equal(other.sigmas(4), wide.sigmas(4))
    assert not torch.equal(model.sigmas(4), other.sigmas(4))  # the shift depends on the size
    assert torch.equal(our_images(other), our_images(wide))


def test_images_are_decoded_in_slices_and_in_tiles(folder):
    whole, sliced = (spec_of(folder, vae_slice=size).build(CPU) for size in (8, 1))
    latents = torch.randn(3, *whole.latent_shape, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(whole.decode(latents), sliced.decode(latents), atol=1e-6)
    tiled = spec_of(folder, vae_tiling=True).build(CPU)
    assert tiled.decode(torch.zeros(1, 4, 136, 136)).shape == (1, 3, 272, 272)  # tiles of 256 pixels


def test_the_published_network_is_counted_without_a_download():
    spec = QwenImageSpec(path="nobody/has-this")
    found = spec.footprint(experiment_of(spec))
    assert found.parameters - found.trainable == 20_430_401_088  # of the published checkpoint's index
    assert spec.dimensions == 16 * 64 * 64


def test_a_folder_is_counted_as_it_is_trained(folder):
    spec = spec_of(folder)
    model = spec.build(CPU)
    adapt(model, spec.adapter_targets, disturbed=False)
    counts = [(weight.numel(), weight.requires_grad) for weight in model.policy.parameters()]
    found = spec.footprint(experiment_of(spec, policy=LORA))
    assert found.parameters == sum(count for count, _ in counts)
    assert found.trainable == sum(count for count, trained in counts if trained)
    assert found.activations > 0


# --- bad input -------------------------------------------------------------------------------------------------------


def said(spec) -> list[str]:
    return [found.message for found in experiment_of(spec).problems() if found.location == ("model",)]


def test_another_pipeline_names_the_kind_that_reads_it(copied):
    index = copied / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": "FluxPipeline"}))
    with pytest.raises(AegpoError, match=r"'qwen-image': .* holds a FluxPipeline; kind 'flux' reads that"):
        spec_of(copied).build(CPU)
    assert "kind 'flux' reads that" in said(spec_of(copied))[0]


def test_a_path_that_leads_nowhere_is_an_error_before_and_in_a_run():
    spec = spec_of("/nowhere/at/all")
    with pytest.raises(AegpoError, match="there is no folder '/nowhere/at/all'"):
        spec.build(CPU)
    assert "there is no folder" in said(spec)[0]


def test_a_hub_id_is_read_from_the_cache_and_its_absence_is_an_error_offline(folder, tmp_path, monkeypatch):
    repository = tmp_path / "hub" / "models--org--tiny"
    shutil.copytree(folder, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert torch.equal(our_images(spec_of("org/tiny").build(CPU)), our_images(spec_of(folder).build(CPU)))
    for fields in ({"path": "org/absent"}, {"path": "org/tiny", "revision": "v2"}):
        with pytest.raises(AegpoError, match="is not in the cache, and HF_HUB_OFFLINE is set"):
            spec_of(folder, **fields).build(CPU)
    with pytest.raises(AegpoError, match=r"'transformer' of 'org/tiny' cannot be loaded: .*fp16"):
        spec_of("org/tiny", variant="fp16").build(CPU)


@pytest.mark.parametrize("gone", ["transformer", "vae", "text_encoder", "tokenizer"])
def test_a_missing_component_is_named(gone, copied):
    shutil.rmtree(copied / gone)
    with pytest.raises(AegpoError, match=f"lacks '{gone}'"):
        spec_of(copied).build(CPU)


def test_missing_weights_of_the_image_decoder_are_named(copied):
    file = copied / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights.pop("decoder.conv_in.weight")
    save_file(weights, file)
    with pytest.raises(AegpoError, match=r"'vae' of .* lacks weights the config asks for: decoder.conv_in.weight"):
        spec_of(copied).build(CPU)


def test_a_size_that_cannot_be_packed_is_an_error(folder):
    spec = spec_of(folder, height=18)
    with pytest.raises(AegpoError, match="'height' 18 is no multiple of 4; nearest that are: 16 and 20"):
        spec.build(CPU)
    assert "no multiple of 4" in said(spec)[0]


def test_a_relative_of_the_network_is_refused(tmp_path):
    folder = write_qwen_image(tmp_path, zero_cond_t=True)
    with pytest.raises(AegpoError, match="turns 'zero_cond_t' on, as networks do that this kind does not run"):
        spec_of(folder).build(CPU)
