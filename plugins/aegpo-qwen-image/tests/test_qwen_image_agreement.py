"""What diffusers' own pipeline paints, from the same latents; a LoRA that it loads."""

from __future__ import annotations

import math

import pytest
import torch
from aegpo_qwen_image import QwenImageSpec
from small_qwen_image import PROMPTS, TEMPLATE, TEXTS, our_images, start, their_images, tokenizer, write_qwen_image

from aegpo.pipelines import pack
from aegpo.testing import adapt

CPU = torch.device("cpu")
SIZES = [(16, 16), (24, 32)]
CLOSE = 1e-4


def spec_of(folder, **fields) -> QwenImageSpec:
    return QwenImageSpec(**{"path": str(folder), "dtype": "float32", "height": 16, "width": 16} | fields)


def options_of(guidance: float, negative: str = " ") -> dict:
    return {"true_cfg_scale": guidance, "negative_prompt": [negative] * len(TEXTS) if guidance > 1 else None}


def assert_agree(spec, folder, **options):
    model = spec.build(CPU)
    images, expected = our_images(model), their_images(folder, start(model), **options)
    assert images.shape == expected.shape == (len(TEXTS), 3, spec.height, spec.width)
    assert float(expected.std()) > 0.05
    assert float((images - expected).abs().max()) < CLOSE
    return images


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_images_are_the_pipelines_own(guidance, height, width, folder):
    assert_agree(spec_of(folder, height=height, width=width, guidance=guidance), folder, **options_of(guidance))


def test_prompt_guidance_and_negative_prompt_matter(folder):
    plain = assert_agree(spec_of(folder, guidance=1.0), folder, **options_of(1.0))
    guided = assert_agree(spec_of(folder, guidance=4.0), folder, **options_of(4.0))
    negative = spec_of(folder, guidance=4.0, negative_prompt="green cube")
    steered = assert_agree(negative, folder, **options_of(4.0, "green cube"))
    other = our_images(spec_of(folder, guidance=1.0).build(CPU), texts=TEXTS[::-1])
    for one in (guided, steered, other):
        assert float((one - plain).abs().max()) > 10 * CLOSE
    assert float((steered - guided).abs().max()) > 10 * CLOSE


@pytest.mark.parametrize(
    "schedule",
    [
        {"use_dynamic_shifting": True, "base_shift": math.log(3), "max_shift": math.log(3)},  # Qwen-Image-Lightning's
        {"shift": 3.0},
        {"use_dynamic_shifting": True, "time_shift_type": "linear", "shift_terminal": 0.1},
    ],
    ids=str,
)
def test_other_schedules_are_walked_as_diffusers_walks_them(schedule, tmp_path):
    folder = write_qwen_image(tmp_path, schedule=schedule)
    assert_agree(spec_of(folder, guidance=2.0), folder, **options_of(2.0))


@pytest.mark.parametrize("gradient", ["both", "conditional"])
def test_images_do_not_depend_on_which_evaluation_learns(gradient, folder):
    assert_agree(spec_of(folder, guidance=4.0, guidance_gradient=gradient), folder, **options_of(4.0))


def test_prompts_are_cut_where_the_pipeline_cuts_them(folder):
    assert_agree(spec_of(folder, guidance=1.0, max_sequence_length=7), folder, max_sequence_length=7)


def test_guidance_leaves_every_token_as_long_as_the_conditional_one(folder):
    latents, sigma = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0.8, 0.4])
    plain, guided = (spec_of(folder, guidance=guidance).build(CPU) for guidance in (1.0, 4.0))
    with torch.no_grad():
        one = pack(plain.velocity(latents, sigma, plain.encode(PROMPTS)))
        other = pack(guided.velocity(latents, sigma, guided.encode(PROMPTS)))
    assert torch.allclose(one.norm(dim=-1), other.norm(dim=-1), atol=1e-5)
    assert float((one - other).abs().max()) > 1e-3


def test_the_template_of_the_small_tokenizer_begins_with_the_tokens_that_are_dropped():
    """As with the published tokenizer: 34 tokens before the prompt, 5 after it."""
    tokens = tokenizer()
    ids = tokens(TEMPLATE.format(TEXTS[1])).input_ids
    assert tokens.decode(ids[34:]) == "two blue squares<|im_end|>\n<|im_start|>assistant\n"
    assert len(ids) - 34 - 5 >= 3


def test_a_saved_lora_is_loaded_by_the_pipeline_and_paints_the_same(folder, tmp_path):
    model = spec_of(folder, guidance=3.0).build(CPU)
    plain = our_images(model)
    adapt(model, model.spec.adapter_targets)
    images = our_images(model)
    assert float((images - plain).abs().max()) > 10 * CLOSE
    model.save_adapters(tmp_path / "lora")
    again = their_images(folder, start(model), lora=tmp_path / "lora", **options_of(3.0))
    assert float((images - again).abs().max()) < CLOSE


def test_a_saved_pipeline_has_the_policy_in_it(folder, tmp_path):
    model = spec_of(folder).build(CPU)
    adapt(model, model.spec.adapter_targets)
    images = our_images(model)
    model.save_pipeline(tmp_path / "whole")
    assert torch.allclose(images, their_images(tmp_path / "whole", start(model), **options_of(4.0)), atol=CLOSE)
    assert float((images - our_images(spec_of(folder).build(CPU))).abs().max()) > 10 * CLOSE
