"""Pipelines and scorers with random weights: configs, tokenizers and small text encoders on disk, the rest on device.

No number here is read from a checkpoint. Architectures are the published ones (those that `aegpo check` estimates
from), text encoders have one narrow layer of the right width, since prompts are encoded ahead.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import diffusers
import torch
from torch import Tensor, nn

import aegpo.models.pipeline.images
import aegpo.models.pipeline.model
import aegpo.rewards.hpsv2
from aegpo.models.flux import ARCHITECTURE as FLUX
from aegpo.models.pipeline.loading import DTYPES
from aegpo.models.pipeline.options import PipelineOptions
from aegpo.models.sd3 import ARCHITECTURE as SD3

WORDS = "a above and background below blue circle circles cube four green left of on purple red right square two the"
TOKENS = 77  # CLIP's
LAST = ("proj_out", "norm_out")  # what an untrained network's output depends on; drawn, since some begin at 0
SPREAD = 0.02  # of those weights
# vae/config.json of stable-diffusion-3.5-medium and FLUX.1-dev, which differ in two factors
VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 16,
    "norm_num_groups": 32,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
PATCHES = {"in_channels": 16, "out_channels": 16, "patch_size": 2}  # of SD 3.5, as diffusers has them by default
SMALL_VAE = {
    **VAE,
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "block_out_channels": [8, 8],
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
}


@dataclass(frozen=True)
class Pipeline:
    """What a random pipeline is made of."""

    kind: str  # sd3, flux
    transformer: Mapping[str, Any]
    vae: Mapping[str, Any]
    clip_widths: tuple[int, ...]  # of each CLIP text encoder
    t5_width: int
    scheduler: Mapping[str, Any] = field(default_factory=dict)


def sd3(dry: bool, share: float = 1.0) -> Pipeline:
    """Stable Diffusion 3.5 Medium; `share`: of its blocks."""
    factors = {"scaling_factor": 1.5305, "shift_factor": 0.0609}
    small: dict[str, Any] = {"sample_size": 8, "in_channels": 4, "out_channels": 4, "patch_size": 2, "num_layers": 4}
    small |= {"attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 32, "qk_norm": "rms_norm"}
    small |= {"caption_projection_dim": 16, "pooled_projection_dim": 32, "pos_embed_max_size": 16}
    whole: dict[str, Any] = {**small, "dual_attention_layers": (0, 1)} if dry else {**SD3, **PATCHES}
    dual = range(_part(len(whole["dual_attention_layers"]), share))
    network = {**whole, "num_layers": _part(whole["num_layers"], share), "dual_attention_layers": tuple(dual)}
    if dry:
        return Pipeline("sd3", network, {**SMALL_VAE, **factors}, (16, 16), 32, {"shift": 3.0})
    return Pipeline("sd3", network, {**VAE, **factors}, (768, 1280), 4096, {"shift": 3.0})


def flux(dry: bool, share: float = 1.0) -> Pipeline:
    """FLUX.1-dev; `share`: of its blocks."""
    factors = {"scaling_factor": 0.3611, "shift_factor": 0.1159}
    scheduler = {"shift": 3.0, "use_dynamic_shifting": True}
    small = {"patch_size": 1, "in_channels": 16, "attention_head_dim": 8, "num_attention_heads": 2}
    small |= {"joint_attention_dim": 16, "pooled_projection_dim": 16, "guidance_embeds": True}
    double, single = (2, 4) if dry else (19, 38)
    number = {"num_layers": _part(double, share), "num_single_layers": _part(single, share)}
    if dry:
        network = {**small, **number, "axes_dims_rope": (2, 2, 4)}
        return Pipeline("flux", network, {**SMALL_VAE, **factors}, (16,), 16, scheduler)
    return Pipeline("flux", {**FLUX, **number}, {**VAE, **factors}, (768,), 4096, scheduler)


def _part(whole: int, share: float) -> int:
    return max(1, round(whole * share))


# --- on disk ---------------------------------------------------------------------------------------------------------


def write(pipeline: Pipeline, folder: Path) -> Path:
    """A pipeline's folder, without the weights of transformer and VAE."""
    sd = pipeline.kind == "sd3"
    with torch.random.fork_rng(), torch.device("meta"):
        network = (diffusers.SD3Transformer2DModel if sd else diffusers.FluxTransformer2DModel)(**pipeline.transformer)
        vae = diffusers.AutoencoderKL(**pipeline.vae)
    parts: dict[str, Any] = {"scheduler": diffusers.FlowMatchEulerDiscreteScheduler(**pipeline.scheduler)}
    texts = [_clip(width, projected=sd) for width in pipeline.clip_widths] + [_t5(pipeline.t5_width)]
    for number, text in enumerate(texts, 1):
        suffix = "" if number == 1 else f"_{number}"
        parts |= {f"text_encoder{suffix}": text, f"tokenizer{suffix}": _tokenizer()}
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    network.save_config(folder / "transformer")
    vae.save_config(folder / "vae")
    (diffusers.StableDiffusion3Pipeline if sd else diffusers.FluxPipeline)(
        transformer=network, vae=vae, **parts
    ).save_config(folder)
    return folder


def write_scorer(folder: Path) -> Path:
    """What reward hpsv2 wants to find: CLIP's tokenizer, and a checkpoint, which `random_weights` stands in for."""
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    CLIPTokenizer(vocab={piece: index for index, piece in enumerate(pieces)}, merges=[]).save_pretrained(folder)
    (folder / "none.safetensors").touch()
    (folder / "pieces.json").write_text(json.dumps(len(pieces)))
    return folder


def _clip(width: int, projected: bool) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(_vocabulary()),
        hidden_size=width,
        intermediate_size=32,
        projection_dim=width,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=3,
    )
    network: nn.Module = (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)
    return network


def _t5(width: int) -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    size = len(_vocabulary())
    config = T5Config(vocab_size=size, d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    network: nn.Module = T5EncoderModel(config)
    return network


def _vocabulary() -> dict[str, int]:
    return {word: index for index, word in enumerate(["<pad>", "<bos>", "<unk>", "<eos>", *WORDS.split()])}


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel(_vocabulary(), unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    marks = [(mark, _vocabulary()[mark]) for mark in ("<bos>", "<eos>")]
    core.post_processor = processors.TemplateProcessing(single="<bos> $A <eos>", special_tokens=marks)
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "unk_token": "<unk>", "eos_token": "<eos>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=TOKENS, **special)


# --- on the device ---------------------------------------------------------------------------------------------------


@contextmanager
def random_weights(device: str, dry: bool) -> Iterator[None]:
    """Inside, transformers, VAEs and HPSv2's network are made on the device where a checkpoint would be read."""

    def load(spec: PipelineOptions, folder: Path, component: str, cls: Any, dtype: str) -> nn.Module:
        config = cls.load_config(folder, subfolder=component, local_files_only=True)
        network = drawn(cls, config, torch.float32 if dry else DTYPES[dtype], device)
        nn.Module.to(network, dtype=DTYPES[dtype])  # small ones are the same in every dtype, to rounding
        return network

    def read(who: str, path: Path) -> dict[str, Tensor]:
        return hpsv2_tensors(json.loads((path.parent / "pieces.json").read_text()), dry, device)

    with ExitStack() as stack:
        for module in (aegpo.models.pipeline.model, aegpo.models.pipeline.images):
            stack.enter_context(patch.object(module, "load_component", load))
        stack.enter_context(patch.object(aegpo.rewards.hpsv2, "read_tensors", read))
        yield


@torch.no_grad()
def drawn(cls: Any, config: Mapping[str, Any], dtype: torch.dtype, device: str) -> nn.Module:
    """A network of diffusers with random weights, made where it stays and in a dtype that leaves room for it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            network: nn.Module = cls.from_config(dict(config))
    finally:
        torch.set_default_dtype(before)
    nn.Module.to(network, device=device, dtype=dtype)
    for name, weight in network.named_parameters():
        if name.startswith(LAST):
            weight.normal_(std=SPREAD)
    return network.requires_grad_(False).eval()


def hpsv2_tensors(pieces: int, dry: bool, device: str) -> dict[str, Tensor]:
    """A checkpoint in HPSv2's layout, ViT-H-14 but for its vocabulary: 940 million random weights."""
    width, inner, layers, side, text, text_layers, embed = (1280, 5120, 32, 16, 1024, 24, 1024)
    if dry:
        width, inner, layers, side, text, text_layers, embed = (80, 80, 1, 2, 64, 1, 32)
    shapes: dict[str, tuple[int, ...]] = {
        "logit_scale": (),
        "visual.class_embedding": (width,),
        "visual.positional_embedding": (side**2 + 1, width),
        "visual.conv1.weight": (width, 3, 14, 14),
        "visual.proj": (width, embed),
        "token_embedding.weight": (pieces, text),
        "positional_embedding": (TOKENS, text),
        "text_projection": (text, embed),
    }
    for name, size in (("visual.ln_pre", width), ("visual.ln_post", width), ("ln_final", text)):
        shapes |= {f"{name}.weight": (size,), f"{name}.bias": (size,)}
    for number in range(layers):
        shapes |= _block(f"visual.transformer.resblocks.{number}", width, inner)
    for number in range(text_layers):
        shapes |= _block(f"transformer.resblocks.{number}", text, 4 * text)
    generator = torch.Generator(device).manual_seed(0)
    return {name: _weight(name, shape, generator, device) for name, shape in shapes.items()}


def _weight(name: str, shape: tuple[int, ...], generator: torch.Generator, device: str) -> Tensor:
    if "ln_" in name and name.endswith("weight"):
        return torch.ones(shape, device=device)
    return SPREAD * torch.randn(shape, generator=generator, device=device)


def _block(name: str, width: int, inner: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    layers = {"attn.out_proj": (width, width), "mlp.c_fc": (inner, width), "mlp.c_proj": (width, inner)}
    for layer, (rows, columns) in layers.items():
        shapes |= {f"{name}.{layer}.weight": (rows, columns), f"{name}.{layer}.bias": (rows,)}
    for norm in ("ln_1", "ln_2"):
        shapes |= {f"{name}.{norm}.weight": (width,), f"{name}.{norm}.bias": (width,)}
    return shapes | {f"{name}.attn.in_proj_weight": (3 * width, width), f"{name}.attn.in_proj_bias": (3 * width,)}
