"""The adapters of diffusers pipelines: what they promise the engine beyond the images themselves."""

from __future__ import annotations

import json

import diffusers
import pipelines
import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import load_file
from worlds import CPU, asked, execution, small_experiment

from aegpo.core.experiment import EvaluationSpec
from aegpo.core.exporting import Exportable
from aegpo.core.interfaces import Preparable, Resizable
from aegpo.core.sections import PolicySpec
from aegpo.models.adapters import add_adapters
from aegpo.models.flux import FluxSpec
from aegpo.models.sd import SdSpec
from aegpo.models.sd3 import Sd3Spec
from aegpo.models.sdxl import SdxlSpec
from aegpo.testing import check_model
from aegpo.train.policy import Policy
from aegpo.train.rollouts import sample_deterministic

SPECS = {"sd": SdSpec, "sdxl": SdxlSpec, "sd3": Sd3Spec, "flux": FluxSpec}
KINDS = tuple(SPECS)
TEXTS = ["a red circle", "two blue squares"]


def spec_of(kind, folder, **fields):
    return SPECS[kind](**{"path": str(folder), "dtype": "float32", "height": 16, "width": 16} | fields)


def evaluate(model, seed=0):
    latents = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(seed))
    return model.velocity(latents, torch.tensor([0.8, 0.5]), model.encode(asked(TEXTS)))


def disturb_adapters(model, seed=1):
    """LoRA starts at nothing; after this it does something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.policy.named_parameters():
            if "lora_" in name:
                weight.copy_(0.2 * torch.randn(weight.shape, generator=generator))


def paint(model, seed=0):
    noise = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(seed))
    return sample_deterministic(execution(model, 4), noise, model.encode(asked(TEXTS)))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_fulfils_the_interface(kind, pipeline_folders):
    spec = spec_of(kind, pipeline_folders[kind], height=16, width=24)
    check_model(spec, TEXTS)
    model = spec.build(CPU)
    assert all(isinstance(model, protocol) for protocol in (Preparable, Resizable, Exportable))


@pytest.mark.parametrize("kind", KINDS)
def test_the_base_is_the_network_without_its_adapters(kind, pipeline_folders):
    model = spec_of(kind, pipeline_folders[kind]).build(CPU)
    with torch.no_grad():
        before = evaluate(model)
        add_adapters(model.policy, PolicySpec(train="lora", rank=2), model.spec.adapter_targets)
        disturb_adapters(model)
        assert float((evaluate(model) - before).abs().max()) > 1e-3
        with model.frozen("base"):
            assert torch.equal(evaluate(model), before)


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_sit_where_the_published_code_puts_them(kind, pipeline_folders):
    model = spec_of(kind, pipeline_folders[kind]).build(CPU)
    add_adapters(model.policy, PolicySpec(train="lora", rank=2), model.spec.adapter_targets)
    adapted = {name.split(".lora_")[0] for name, w in model.policy.named_parameters() if w.requires_grad}
    assert adapted
    assert all(name.endswith(model.spec.adapter_targets) for name in adapted)
    if kind == "sd3":
        assert not any(".attn2." in name for name in adapted)
    if kind == "flux":
        assert any("ff_context" in name for name in adapted)


def test_a_full_copy_waits_in_cpu_memory_and_stays_what_the_policy_was(pipeline_folders):
    model = spec_of("sd", pipeline_folders["sd"], offload_base=True).build(CPU)
    with torch.no_grad():
        before = evaluate(model)
        add_adapters(model.policy, PolicySpec())
        with model.frozen("base"):
            pass
        for weight in model.policy.parameters():
            weight.mul_(1.1)
        assert float((evaluate(model) - before).abs().max()) > 1e-3
        with model.frozen("base"):
            assert torch.equal(evaluate(model), before)


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3"])
def test_the_unconditional_evaluation_learns_only_where_that_is_asked_for(kind, pipeline_folders):
    gradients = {}
    for gradient in ("both", "conditional"):
        model = spec_of(kind, pipeline_folders[kind], guidance=3.0, guidance_gradient=gradient).build(CPU)
        model.policy.requires_grad_(True)
        velocity = evaluate(model)
        velocity.square().mean().backward()
        gradients[gradient] = torch.cat([w.grad.flatten() for w in model.policy.parameters() if w.grad is not None])
        alone = spec_of(kind, pipeline_folders[kind], guidance=1.0).build(CPU)
        alone.policy.requires_grad_(True)
        weighed = (evaluate(alone) * velocity.detach()).mean() * 2 * 3.0  # d velocity / d conditional = guidance
        weighed.backward()
        conditional = torch.cat([w.grad.flatten() for w in alone.policy.parameters() if w.grad is not None])
        agree = torch.allclose(gradients[gradient], conditional, rtol=1e-3, atol=1e-5)
        assert agree == (gradient == "conditional")


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_changes_no_gradient(kind, pipeline_folders):
    gradients = []
    for checkpointing in (False, True):
        model = spec_of(kind, pipeline_folders[kind], gradient_checkpointing=checkpointing).build(CPU)
        add_adapters(model.policy, PolicySpec(train="lora", rank=2), model.spec.adapter_targets)
        disturb_adapters(model)
        evaluate(model).square().mean().backward()
        gradients.append([w.grad for w in model.policy.parameters() if w.requires_grad])
        assert model.policy.is_gradient_checkpointing == checkpointing
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(*gradients, strict=True))
    assert any(float(gradient.abs().max()) > 0 for gradient in gradients[0])


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_weights_give_float32_velocities_close_to_those_of_float32(kind, pipeline_folders):
    with torch.no_grad():
        exact = evaluate(spec_of(kind, pipeline_folders[kind]).build(CPU))
        model = spec_of(kind, pipeline_folders[kind], dtype="bfloat16").build(CPU)
        add_adapters(model.policy, PolicySpec(train="lora", rank=2), model.spec.adapter_targets)
        rough = evaluate(model)
    assert rough.dtype == torch.float32
    assert 0 < float((rough - exact).abs().max()) < 0.1 * float(exact.abs().max())
    dtypes = {name: weight.dtype for name, weight in model.policy.named_parameters()}
    assert {dtypes[name] for name in dtypes if "lora_" in name} == {torch.float32}
    assert {dtypes[name] for name in dtypes if "lora_" not in name} == {torch.bfloat16}


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_noise_levels_stay_exact_when_the_weights_are_bfloat16(kind, pipeline_folders):
    """Only FLUX rounds the time it is told, 913.4 to 916, as it does in a bfloat16 pipeline of diffusers."""
    model = spec_of(kind, pipeline_folders[kind], dtype="bfloat16").build(CPU)
    seen = []
    model.policy.time_text_embed.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    level = torch.tensor([0.9134, 0.5])
    with torch.no_grad():
        model.velocity(torch.zeros(2, *model.latent_shape), level, model.encode(asked(TEXTS)))
    told = level.bfloat16() * 1000 if kind == "flux" else level * 1000
    assert torch.equal(seen[0][-2:], told)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tap_sees_every_softmax_attention_once_for_each_evaluation(kind, pipeline_folders):
    guidance = {"true_guidance": 2.0} if kind == "flux" else {"guidance": 2.0}
    model = spec_of(kind, pipeline_folders[kind], **guidance).build(CPU)
    calls = []
    with torch.no_grad(), model.tap_attention(calls.append):
        evaluate(model)
    assert {call.kind for call in calls} == {"sd3": {"joint", "self"}, "flux": {"joint"}}.get(kind, {"self", "cross"})
    names = [call.layer for call in calls]
    assert names[::2] == names[1::2] or names[: len(names) // 2] == names[len(names) // 2 :]
    assert len(set(names)) == len(names) // 2
    assert all(len(call.query) == len(call.key) == 2 for call in calls)
    for call in calls:
        image = call.image.stop - call.image.start
        if call.kind == "joint":
            assert image + call.text.stop - call.text.start == call.key.shape[2]
        assert image in {"sd": (64, 16), "sdxl": (64, 16)}.get(kind, (16,))


def test_in_one_batch_a_tap_sees_of_both_evaluations_what_each_alone_shows(pipeline_folders):
    seen = {}
    for scale in (1.0, 2.0):
        model, seen[scale] = spec_of("sd3", pipeline_folders["sd3"], guidance=scale).build(CPU), []
        with torch.no_grad(), model.tap_attention(seen[scale].append):
            evaluate(model)
    guided = seen[2.0][1::2]  # each layer shows what is steered away from first
    assert [call.layer for call in guided] == [call.layer for call in seen[1.0]]
    for found, alone in zip(guided, seen[1.0], strict=True):
        torch.testing.assert_close(found.query, alone.query, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found.key, alone.key, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(seen[2.0][0].key, guided[0].key, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_network_paints_other_sizes(kind, pipeline_folders):
    folder = pipeline_folders[kind]
    wide = spec_of(kind, folder, height=16, width=32).build(CPU)
    model = spec_of(kind, folder).build(CPU)
    other = model.at(16, 32)
    assert other.policy is model.policy
    assert torch.equal(other.sigmas(4), wide.sigmas(4))
    assert torch.equal(paint(other), paint(wide))
    assert model.latent_shape == (4, 8, 8)
    if kind == "flux":  # whose shift depends on the size
        assert not torch.equal(model.sigmas(4), other.sigmas(4))


def test_images_are_decoded_in_slices_and_in_tiles(pipeline_folders):
    whole = spec_of("sd3", pipeline_folders["sd3"], vae_slice=8).build(CPU)
    sliced = spec_of("sd3", pipeline_folders["sd3"], vae_slice=1, vae_tiling=True).build(CPU)
    small = torch.randn(3, *whole.latent_shape, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(whole.decode(small), sliced.decode(small), atol=1e-6)
    large = torch.randn(1, 4, 64, 64, generator=torch.Generator().manual_seed(0))
    assert sliced.decode(large).shape == (1, 3, 128, 128)


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_lora_is_loaded_by_the_pipeline_and_paints_the_same(kind, pipeline_folders, tmp_path):
    from test_agreement import theirs

    guidance = 2.5 if kind == "flux" else 3.0
    model = spec_of(kind, pipeline_folders[kind], guidance=guidance).build(CPU)
    plain = paint(model)
    add_adapters(model.policy, PolicySpec(train="lora", rank=2, alpha=6), model.spec.adapter_targets)
    disturb_adapters(model)
    images = paint(model)
    assert float((images - plain).abs().max()) > 1e-3
    model.save_adapters(tmp_path / "lora")
    noise = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))

    def load(pipeline):
        pipeline.load_lora_weights(tmp_path / "lora")

    again = theirs(kind, pipeline_folders[kind], noise, 4, change=load, texts=TEXTS, guidance_scale=guidance)
    assert float((images - again).abs().max()) < 1e-4


@pytest.mark.parametrize("alpha", [2, 4, 5])
def test_a_saved_lora_means_the_same_to_a_reader_that_knows_no_header_and_no_alpha(alpha, pipeline_folders, tmp_path):
    model = spec_of("sd3", pipeline_folders["sd3"]).build(CPU)
    add_adapters(model.policy, PolicySpec(train="lora", rank=2, alpha=alpha), model.spec.adapter_targets)
    disturb_adapters(model)
    model.save_adapters(tmp_path)
    saved = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    with safe_open(tmp_path / "pytorch_lora_weights.safetensors", "pt") as file:
        config = json.loads(file.metadata()["lora_adapter_metadata"])
    assert config["transformer.lora_alpha"] == config["transformer.r"] == 2
    adapted = {name: part for name, part in model.policy.named_modules() if isinstance(part, BaseTunerLayer)}
    assert len(saved) == 2 * len(adapted)  # no key that only some readers know
    for name, part in adapted.items():
        up, down = (saved[f"transformer.{name}.lora_{which}.weight"] for which in "BA")
        assert torch.allclose(up @ down, part.get_delta_weight("default"), atol=1e-6)


def test_what_a_folder_or_its_network_never_reads_is_told(tmp_path, pipeline_folders):
    schnell = pipelines.write_flux(tmp_path, guidance_embeds=False, dynamic_shift=False)
    lora = PolicySpec(train="lora")

    def told(folder, **fields):
        model = spec_of("flux", folder, **fields)
        return list(model.cautions(small_experiment(model, policy=lora)))

    (caution,) = told(schnell, guidance=2.0)
    assert caution.startswith("'guidance' 2 has no effect: this network has no guidance embedding; remove it, or set")
    assert told(schnell) == told(schnell, true_guidance=2.0) == told(pipeline_folders["flux"], guidance=2.0) == []
    (caution,) = told(schnell, revision="main")
    assert caution.startswith("'revision' 'main' has no effect: 'path' is a folder")
    (caution,) = told(schnell, offload_base=True)
    assert caution.startswith("'offload_base' has no effect under 'policy.train: lora'")


@pytest.mark.parametrize("train", ["lora", "full"])
@pytest.mark.parametrize("kind", ["sd", "sd3"])
def test_a_saved_pipeline_has_the_policy_in_it(kind, train, pipeline_folders, tmp_path):
    model = spec_of(kind, pipeline_folders[kind]).build(CPU)
    add_adapters(model.policy, PolicySpec(train=train, rank=2, alpha=6), model.spec.adapter_targets)
    if train == "lora":
        disturb_adapters(model)
    else:
        with torch.no_grad():
            model.policy.conv_in.weight.mul_(1.2) if kind == "sd" else model.policy.pos_embed.proj.weight.mul_(1.2)
    images = paint(model)
    model.save_pipeline(tmp_path / "whole")
    pipeline = getattr(diffusers, model.spec.pipeline_class).from_pretrained(tmp_path / "whole")
    assert not hasattr(pipeline, "peft_config")
    again = paint(spec_of(kind, tmp_path / "whole").build(CPU))
    assert torch.allclose(images, again, atol=1e-4)
    assert float((images - paint(spec_of(kind, pipeline_folders[kind]).build(CPU))).abs().max()) > 1e-3


def test_a_policy_without_adapters_has_no_lora_to_save(pipeline_folders, tmp_path):
    from aegpo.errors import AegpoError

    model = spec_of("sd", pipeline_folders["sd"]).build(CPU)
    with pytest.raises(AegpoError, match="has no LoRA to write; write a whole pipeline instead"):
        model.save_adapters(tmp_path)


def test_time_ids_of_sdxl_are_the_size_in_pixels(pipeline_folders):
    model = spec_of("sdxl", pipeline_folders["sdxl"], height=16, width=24, guidance=1.0).build(CPU)
    seen = []
    model.policy.register_forward_pre_hook(lambda module, args, given: seen.append(given), with_kwargs=True)
    with torch.no_grad():
        evaluate(model)
    assert seen[0]["added_cond_kwargs"]["time_ids"].tolist() == [[16, 24, 0, 0, 16, 24]] * 2
    assert model.encode(asked(TEXTS)).extra["time_ids"].tolist() == [[16, 24, 0, 0, 16, 24]] * 2
    assert pipelines.SCALE == 2


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_sdxl_is_told_the_size_of_the_images_that_evaluation_paints(guidance, pipeline_folders):
    size = EvaluationSpec(height=24, width=32)
    spec = spec_of("sdxl", pipeline_folders["sdxl"], guidance=guidance)
    policy, seen = Policy(small_experiment(spec, evaluation=size)), []
    policy.model.policy.register_forward_pre_hook(lambda module, args, given: seen.append(given), with_kwargs=True)
    policy.images(asked(TEXTS), policy.evaluation_noise(asked(TEXTS)))
    told = [row for given in seen for row in given["added_cond_kwargs"]["time_ids"].tolist()]
    assert told == [[24, 32, 0, 0, 24, 32]] * len(told)
    assert len(told) == (8 if guidance == 1.0 else 16)  # 2 prompts, 4 steps, both halves
    seen.clear()
    with torch.no_grad():
        evaluate(policy.model)
    assert seen[0]["added_cond_kwargs"]["time_ids"][0].tolist() == [16, 16, 0, 0, 16, 16]
