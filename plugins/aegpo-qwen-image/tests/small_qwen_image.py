"""A small QwenImagePipeline with random weights, written as `save_pretrained` writes the published one.

The tokenizer is a byte-level BPE trained on the pipeline's own template, in which every word is a token as in the
published one, so that the template begins with the 34 tokens that the pipeline drops.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from aegpo import Model, Prompt
from aegpo.pipelines import pack
from aegpo.testing import paint

SCALE = 2  # pixels a latent is wide
WIDTH = 16  # of the text encoder
CHANNELS = 4
TEXTS = ["a red circle on the left", "two blue squares"]
PROMPTS = [Prompt(index, text) for index, text in enumerate(TEXTS)]
WORDS = "a red circle on the left two blue squares green cube four purple circles"
SCHEDULE = {  # scheduler_config.json of Qwen-Image
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 0.9,
    "base_image_seq_len": 256,
    "max_image_seq_len": 8192,
    "shift_terminal": 0.02,
}
TEMPLATE = (  # of diffusers' QwenImagePipeline
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)


def write_qwen_image(folder: Path, schedule: dict[str, Any] | None = None, **transformer: Any) -> Path:
    """The whole folder in about a second: transformer, VAE, text encoder, tokenizer, scheduler."""
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokens = tokenizer()
        pipeline = diffusers.QwenImagePipeline(
            transformer=network(**transformer),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**(SCHEDULE if schedule is None else schedule)),
            vae=vae(),
            text_encoder=text_encoder(len(tokens)),
            tokenizer=tokens,
        )
    pipeline.save_pretrained(folder)
    return folder


def network(**changes: Any) -> torch.nn.Module:
    """Two layers of two heads, with biases that matter."""
    sizes = {
        "patch_size": 2,
        "in_channels": 4 * CHANNELS,
        "out_channels": CHANNELS,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": WIDTH,
        "axes_dims_rope": (2, 2, 4),
    }
    made = diffusers.QwenImageTransformer2DModel(**sizes | changes)
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if name.endswith("bias") or name.startswith(("proj_out", "norm_out")):
                weight.normal_(std=0.1)
    return made


def vae() -> torch.nn.Module:
    """One halving; means and standard deviations that matter."""
    return diffusers.AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=CHANNELS,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[-0.5, 0.2, 0.1, -0.1],
        latents_std=[1.5, 0.7, 1.1, 2.0],
    )


def text_encoder(vocabulary: int) -> torch.nn.Module:
    """Qwen2.5-VL, its eyes included."""
    text = {
        "vocab_size": vocabulary,
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
    }
    eyes = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": WIDTH}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=eyes)).eval()


def tokenizer() -> Qwen2Tokenizer:
    """Every word of the template and of `WORDS` is one token."""
    marks = ["<|im_start|>", "<|im_end|>"]
    read = [TEMPLATE.format(" " + WORDS), *WORDS.split()]
    return Qwen2Tokenizer().train_new_from_iterator(read, vocab_size=1000, new_special_tokens=marks)


def start(model: Model, seed: int = 0) -> Tensor:
    """Start noise of two images."""
    return torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(seed))


def our_images(model: Model, texts: Sequence[str] = TEXTS) -> Tensor:
    """Images (2, 3, h, w) of the deterministic sampler, from the noise of `start`."""
    return paint(model, texts, start(model), steps=5)


def their_images(folder: Path, noise: Tensor, lora: Path | None = None, **options: Any) -> Tensor:
    """What the pipeline of `folder` paints from the same noise, with a LoRA if there is one."""
    pipeline = diffusers.QwenImagePipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    if lora is not None:
        pipeline.load_lora_weights(lora)
    height, width = (SCALE * side for side in noise.shape[-2:])
    given = {"prompt": TEXTS, "num_inference_steps": 5, "height": height, "width": width}
    return pipeline(**given | options, latents=pack(noise), output_type="pt").images
