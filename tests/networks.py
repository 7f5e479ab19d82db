"""Small diffusers networks with random weights, one for each family, and inputs that fit them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from torch import nn

HEADS = {"attention_head_dim": 16, "num_attention_heads": 2}


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


@dataclass
class Small:
    """A network, what to call it with, and what its attentions should be."""

    name: str
    config: dict[str, Any]
    inputs: Callable[[], dict[str, Any]]
    kinds: dict[str, tuple[str, slice, slice]] = field(default_factory=dict)  # by the end of the layer's name

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        network = getattr(diffusers, self.name)(**self.config).eval()
        for weight in network.parameters():
            if weight.dim() > 1 and not weight.any():
                nn.init.normal_(weight, std=0.02)  # zero-initialised outputs would hide a change
        return network


def at(*sizes: int) -> torch.Tensor:
    return torch.full(sizes, 0.5)


def ids(*sizes: int) -> torch.Tensor:
    return torch.zeros(sizes)


WORDS, IMAGE_8 = normal(2, 7, 32), normal(2, 4, 8, 8)
FIRST_16, LAST_7 = slice(0, 16), slice(16, 23)
LAST_16, FIRST_7 = slice(7, 23), slice(0, 7)
FLUX = {"patch_size": 1, "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "joint_attention_dim": 32}
PACKED = normal(2, 16, 16)

NETWORKS = [
    Small(
        "SD3Transformer2DModel",
        {"sample_size": 32, "patch_size": 2, "in_channels": 4, "num_layers": 2, "joint_attention_dim": 32, **HEADS}
        | {"caption_projection_dim": 32, "pooled_projection_dim": 64, "out_channels": 4, "pos_embed_max_size": 32}
        | {"qk_norm": "rms_norm", "dual_attention_layers": (0,)},
        lambda: (
            {"hidden_states": IMAGE_8, "encoder_hidden_states": WORDS, "pooled_projections": normal(2, 64)}
            | {"timestep": at(2)}
        ),
        {".attn": ("joint", FIRST_16, LAST_7), ".attn2": ("self", FIRST_16, slice(16, 16))},
    ),
    Small(
        "FluxTransformer2DModel",
        FLUX | HEADS | {"pooled_projection_dim": 32, "guidance_embeds": False, "axes_dims_rope": (4, 6, 6)},
        lambda: (
            {"hidden_states": PACKED, "encoder_hidden_states": WORDS, "pooled_projections": normal(2, 32)}
            | {"timestep": at(2), "img_ids": ids(16, 3), "txt_ids": ids(7, 3)}
        ),
        {".attn": ("joint", LAST_16, FIRST_7)},
    ),
    Small(
        "Flux2Transformer2DModel",
        FLUX | HEADS | {"axes_dims_rope": (4, 4, 4, 4), "timestep_guidance_channels": 32},
        lambda: (
            {"hidden_states": PACKED, "encoder_hidden_states": WORDS, "timestep": at(2), "guidance": at(2)}
            | {"img_ids": ids(2, 16, 4), "txt_ids": ids(2, 7, 4)}
        ),
        {".attn": ("joint", LAST_16, FIRST_7)},
    ),
    Small(
        "ChromaTransformer2DModel",
        FLUX
        | HEADS
        | {"axes_dims_rope": (4, 6, 6), "approximator_num_channels": 8, "approximator_hidden_dim": 16}
        | {"approximator_layers": 1},
        lambda: (
            {"hidden_states": PACKED, "encoder_hidden_states": WORDS, "timestep": at(2)}
            | {"img_ids": ids(16, 3), "txt_ids": ids(7, 3)}
        ),
        {".attn": ("joint", LAST_16, FIRST_7)},
    ),
    Small(
        "QwenImageTransformer2DModel",
        {"patch_size": 2, "in_channels": 16, "out_channels": 4, "num_layers": 2, "joint_attention_dim": 32, **HEADS}
        | {"guidance_embeds": False, "axes_dims_rope": (8, 4, 4)},
        lambda: (
            {"hidden_states": PACKED, "encoder_hidden_states": WORDS, "timestep": at(2)}
            | {
                "img_shapes": [[(1, 4, 4)]] * 2,
                "encoder_hidden_states_mask": torch.arange(7) < torch.tensor([[7], [4]]),
            }
        ),
        {".attn": ("joint", LAST_16, FIRST_7)},
    ),
    Small(
        "AuraFlowTransformer2DModel",
        {"sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_mmdit_layers": 1, **HEADS}
        | {
            "num_single_dit_layers": 1,
            "joint_attention_dim": 32,
            "caption_projection_dim": 32,
            "pos_embed_max_size": 64,
        },
        lambda: {"hidden_states": IMAGE_8, "encoder_hidden_states": WORDS, "timestep": at(2)},
        {".attn": ("joint", slice(15, 31), slice(8, 15))},
    ),
    Small(
        "Lumina2Transformer2DModel",
        {"sample_size": 8, "patch_size": 2, "in_channels": 4, "hidden_size": 24, "num_layers": 1, "cap_feat_dim": 32}
        | {"num_refiner_layers": 1, "num_attention_heads": 3, "num_kv_heads": 1, "multiple_of": 2}
        | {"scaling_factor": 1.0, "axes_dim_rope": (4, 2, 2), "axes_lens": (128, 128, 128)},
        lambda: (
            {"hidden_states": IMAGE_8, "encoder_hidden_states": WORDS, "timestep": at(2)}
            | {"encoder_attention_mask": torch.ones(2, 7, dtype=torch.bool)}
        ),
        {
            "layers.0.attn": ("joint", LAST_16, FIRST_7),
            "context_refiner.0.attn": ("self", slice(0, 0), FIRST_7),
            "noise_refiner.0.attn": ("self", FIRST_16, slice(16, 16)),
        },
    ),
    Small(
        "ZImageTransformer2DModel",
        {"in_channels": 4, "dim": 32, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2}
        | {"cap_feat_dim": 32, "axes_dims": [8, 4, 4], "axes_lens": [256, 32, 32], "t_scale": 1000.0},
        lambda: {"x": list(normal(2, 4, 1, 8, 8)), "t": at(2), "cap_feats": [normal(7, 32), normal(40, 32)]},
        {
            "layers.0.attention": ("joint", slice(0, 32), slice(32, 96)),
            "context_refiner.0.attention": ("self", slice(0, 0), slice(0, 64)),
            "noise_refiner.0.attention": ("self", slice(0, 32), slice(32, 32)),
        },
    ),
    Small(
        "UNet2DConditionModel",
        {"sample_size": 8, "layers_per_block": 1, "block_out_channels": (16, 32), "norm_num_groups": 4}
        | {"cross_attention_dim": 32, "attention_head_dim": 2}
        | {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")}
        | {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")},
        lambda: {"sample": IMAGE_8, "timestep": torch.tensor(500), "encoder_hidden_states": WORDS},
        {"down_blocks.0.attentions.0.transformer_blocks.0.attn1": ("self", slice(0, 64), slice(64, 64))}
        | {"down_blocks.0.attentions.0.transformer_blocks.0.attn2": ("cross", slice(0, 64), slice(0, 7))},
    ),
    Small(
        "PixArtTransformer2DModel",
        {"sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 8, "num_layers": 1, **HEADS}
        | {"cross_attention_dim": 32, "caption_channels": 32, "use_additional_conditions": False},
        lambda: (
            {"hidden_states": IMAGE_8, "encoder_hidden_states": WORDS, "timestep": at(2)}
            | {"encoder_attention_mask": (torch.arange(7) < torch.tensor([[7], [4]])).long()}
            | {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
        ),
        {".attn1": ("self", FIRST_16, slice(16, 16)), ".attn2": ("cross", FIRST_16, FIRST_7)},
    ),
    Small(
        "SanaTransformer2DModel",
        {"sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 1, **HEADS}
        | {"num_cross_attention_heads": 2, "cross_attention_head_dim": 16, "cross_attention_dim": 32}
        | {"caption_channels": 32},
        lambda: {"hidden_states": IMAGE_8, "encoder_hidden_states": WORDS, "timestep": at(2)},
        {".attn2": ("cross", FIRST_16, FIRST_7)},
    ),
]
