"""Small pipelines with random weights of a fixed seed, which both sides load from the same folder.

About 2.3 million weights (3.3 for the UNet), 256 image tokens, images of 256 x 256 pixels: 16 latent channels an eighth
as wide for SD3 and FLUX, because DanceGRPO and its forks have these numbers in their code, and text encoders and a VAE
so small that nothing but the network counts.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

Family = Literal["sd3", "flux", "sd"]

PIXELS = 256  # a side
LATENT_CHANNELS = 16  # of SD3 and FLUX
TOKENS = 77  # CLIP reads; Flow-GRPO asks for so many
WIDTH = 32  # of every text encoder
HEADS, HEAD = 4, 32
SCALING, SHIFT = 0.3611, 0.1159  # of latents; DanceGRPO has FLUX's in its code
WORDS = "a above and background below blue circle circles cube four green left of on purple red right square two the"
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}  # SD 1.x


def write(family: Family, folder: Path) -> Path:
    """Writes a pipeline as `save_pretrained` does."""
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    torch.manual_seed(0)
    pipeline = {"sd3": _sd3, "flux": _flux, "sd": _sd}[family]()
    network = getattr(pipeline, "transformer", None) or pipeline.unet
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if name.endswith("bias") or name.startswith(("proj_out", "norm_out")):
                weight.normal_(std=0.02)  # which an untrained network has 0
    pipeline.save_pretrained(folder)
    return folder


def weights(folder: Path) -> int:
    """How many weights the trained network has."""
    from safetensors import safe_open

    file = next(folder.glob("transformer/*.safetensors"), None) or next(folder.glob("unet/*.safetensors"))
    with safe_open(file, framework="pt") as tensors:
        return sum(tensors.get_tensor(name).numel() for name in tensors.keys())  # noqa: SIM118 - no mapping


def _sd3() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    network = SD3Transformer2DModel(
        sample_size=PIXELS // 8,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=4,
        attention_head_dim=HEAD,
        num_attention_heads=HEADS,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=HEADS * HEAD,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=PIXELS // 16,
        qk_norm="rms_norm",
    )
    return StableDiffusion3Pipeline(
        transformer=network,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(LATENT_CHANNELS, SCALING, SHIFT),
        text_encoder=_clip(projected=True),
        text_encoder_2=_clip(projected=True),
        text_encoder_3=_t5(2 * WIDTH),
        tokenizer=_tokenizer(TOKENS),
        tokenizer_2=_tokenizer(TOKENS),
        tokenizer_3=_tokenizer(512),
    )


def _flux() -> Any:
    """Levels are 1, 0.9, ... 0: DanceGRPO cuts times off to thousandths, which changes nothing then."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    network = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * LATENT_CHANNELS,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=HEAD,
        num_attention_heads=HEADS,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )
    return FluxPipeline(
        transformer=network,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=_vae(LATENT_CHANNELS, SCALING, SHIFT),
        text_encoder=_clip(projected=False),
        text_encoder_2=_t5(WIDTH),
        tokenizer=_tokenizer(TOKENS),
        tokenizer_2=_tokenizer(512),
    )


def _sd() -> Any:
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    network = UNet2DConditionModel(
        sample_size=PIXELS // 8,
        layers_per_block=1,
        block_out_channels=(48, 96, 96),
        norm_num_groups=8,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )
    settings = {"set_alpha_to_one": False, "steps_offset": 1, "clip_sample": False, **BETAS}
    return StableDiffusionPipeline(
        unet=network,
        scheduler=DDIMScheduler(**settings),
        vae=_vae(4, 0.18215, None),
        text_encoder=_clip(projected=False),
        tokenizer=_tokenizer(TOKENS),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _vae(channels: int, scaling: float, shift: float | None) -> nn.Module:
    from diffusers import AutoencoderKL

    made: nn.Module = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=2,
        sample_size=PIXELS,
        scaling_factor=scaling,
        shift_factor=shift,
        use_quant_conv=shift is None,
        use_post_quant_conv=shift is None,
        force_upcast=False,
    )
    return made


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
    made: nn.Module = (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)
    return made


def _t5(width: int) -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(vocab_size=len(_vocabulary()), d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    made: nn.Module = T5EncoderModel(config)
    return made


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
