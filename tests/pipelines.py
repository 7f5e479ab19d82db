"""Small pipelines with random weights, written as `save_pretrained` writes the published ones.

`write_sd`, `write_sdxl`, `write_sd3` and `write_flux` make a whole folder (network, VAE, text encoders, tokenizers,
scheduler) in well under a second; the model kinds of the same names load it by `path`, as they load a hub id. The VAE
shrinks images by 2 (`SCALE`), so 16 x 16 pixels are 8 x 8 latents, and tokenizers know the words of `WORDS`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

SCALE = 2  # pixels a latent is wide
WORDS = "a above and background below blue circle circles cube four green left of on purple red right square two the"
TOKENS = 12  # CLIP's length here
WIDTH = 16  # of every text encoder
SD3_SHIFT = 3.0
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}  # SD 1.x, SDXL


def write_sd3(folder: Path, **transformer: Any) -> Path:
    """A StableDiffusion3Pipeline like SD 3.5-M: QK-norm, one dual-attention layer, three text encoders, shift 3."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    with _seeded():
        network = SD3Transformer2DModel(
            **{
                "sample_size": 8,
                "patch_size": 2,
                "in_channels": 4,
                "out_channels": 4,
                "num_layers": 2,
                "attention_head_dim": 8,
                "num_attention_heads": 2,
                "joint_attention_dim": 2 * WIDTH,
                "caption_projection_dim": 16,
                "pooled_projection_dim": 2 * WIDTH,
                "pos_embed_max_size": 16,
                "qk_norm": "rms_norm",
                "dual_attention_layers": (0,),
            }
            | transformer
        )
        pipeline = StableDiffusion3Pipeline(
            transformer=network,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=SD3_SHIFT),
            vae=_vae(shift=0.0609),
            text_encoder=_clip(projected=True),
            text_encoder_2=_clip(projected=True),
            text_encoder_3=_t5(2 * WIDTH),
            tokenizer=_tokenizer(TOKENS),
            tokenizer_2=_tokenizer(TOKENS),
            tokenizer_3=_tokenizer(TOKENS),
        )
    return _write(pipeline, folder)


def write_flux(folder: Path, guidance_embeds: bool = True, dynamic_shift: bool = True) -> Path:
    """A FluxPipeline: dev with its guidance embedding and dynamic shift, or schnell without either."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    with _seeded():
        network = FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            pooled_projection_dim=WIDTH,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=(2, 2, 4),
        )
        schedule = {"shift": SD3_SHIFT, "use_dynamic_shifting": True} if dynamic_shift else {"shift": 1.0}
        pipeline = FluxPipeline(
            transformer=network,
            scheduler=FlowMatchEulerDiscreteScheduler(**schedule),
            vae=_vae(shift=0.1159),
            text_encoder=_clip(projected=False),
            text_encoder_2=_t5(WIDTH),
            tokenizer=_tokenizer(TOKENS),
            tokenizer_2=_tokenizer(TOKENS),
        )
    return _write(pipeline, folder)


def write_sd(folder: Path, **scheduler: Any) -> Path:
    """A StableDiffusionPipeline like SD 1.5, with the scheduler it ships (PNDM) or other settings of it."""
    from diffusers import PNDMScheduler, StableDiffusionPipeline

    with _seeded():
        settings = {"set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1, **BETAS, **scheduler}
        pipeline = StableDiffusionPipeline(
            unet=_unet({}),
            scheduler=PNDMScheduler(**settings),
            vae=_vae(shift=None),
            text_encoder=_clip(projected=False),
            tokenizer=_tokenizer(TOKENS),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    return _write(pipeline, folder)


def write_sdxl(folder: Path, **scheduler: Any) -> Path:
    """A StableDiffusionXLPipeline like SDXL base 1.0, with the scheduler it ships (Euler) or other settings of it."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    times, time_width = 6, 4
    added = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": time_width,
        "projection_class_embeddings_input_dim": WIDTH + times * time_width,
        "cross_attention_dim": 2 * WIDTH,
        "use_linear_projection": True,
        "transformer_layers_per_block": (1, 2),
    }
    with _seeded():
        settings = {"timestep_spacing": "leading", "steps_offset": 1, **BETAS, **scheduler}
        pipeline = StableDiffusionXLPipeline(
            unet=_unet(added),
            scheduler=EulerDiscreteScheduler(**settings),
            vae=_vae(shift=None),
            text_encoder=_clip(projected=False),
            text_encoder_2=_clip(projected=True),
            tokenizer=_tokenizer(TOKENS),
            tokenizer_2=_tokenizer(TOKENS),
        )
    return _write(pipeline, folder)


def _unet(added: dict[str, Any]) -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        **{
            "sample_size": 8,
            "layers_per_block": 1,
            "block_out_channels": (8, 16),
            "norm_num_groups": 4,
            "cross_attention_dim": WIDTH,
            "attention_head_dim": 2,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        }
        | added
    )


def _vae(shift: float | None) -> nn.Module:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        scaling_factor=1.5305 if shift else 0.18215,
        shift_factor=shift,
        force_upcast=False,
    )


def _clip(projected: bool) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(_vocabulary()),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=3,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def _t5(width: int) -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(vocab_size=len(_vocabulary()), d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    )


def _vocabulary() -> dict[str, int]:
    return {word: index for index, word in enumerate(["<pad>", "<bos>", "<unk>", "<eos>", *WORDS.split()])}


def _tokenizer(length: int) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = _vocabulary()
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    marks = [("<bos>", vocabulary["<bos>"]), ("<eos>", vocabulary["<eos>"])]
    core.post_processor = processors.TemplateProcessing(single="<bos> $A <eos>", special_tokens=marks)
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "unk_token": "<unk>", "eos_token": "<eos>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=length, **special)


@contextmanager
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def _write(pipeline: Any, folder: Path) -> Path:
    """Saves it with what an untrained network lacks: a last layer that is not zero and biases that matter."""
    network = getattr(pipeline, "transformer", None) or pipeline.unet
    with _seeded(), torch.no_grad():
        for name, weight in network.named_parameters():
            if name.endswith("bias") or name.startswith(("proj_out", "norm_out")):
                weight.normal_(std=0.1)
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    pipeline.save_pretrained(folder)
    return folder
