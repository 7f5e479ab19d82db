"""Small networks with random weights in the layouts that are published, written to disk."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

CONTEXT = 77
TEXTS = [
    "a red cube",
    "A Red CUBE,  on\ta table!",
    "a cat's paw &amp; 42 dogs",
    "caf\u00e9 na\u00efve \u65e5\u672c",
    "word " * 100,
    "",
]


def write_tokenizer(folder: Path) -> Path:
    """CLIP's tokenizer with the 512 bytes, a few merges and its two marks."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    merges = [("r", "e"), ("re", "d</w>"), ("c", "a"), ("ca", "t</w>")]
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(merge) for merge in merges)]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    CLIPTokenizer(vocab=vocabulary, merges=merges).save_pretrained(folder)
    return folder


def write_clip(folder: Path, act: str = "quick_gelu", width: int = 24) -> Path:
    """A CLIP network in transformers' layout, with its tokenizer."""
    write_tokenizer(folder)
    size = len(CLIPTokenizer.from_pretrained(folder))
    both = {"hidden_act": act, "num_hidden_layers": 2, "num_attention_heads": 2, "initializer_factor": 5.0}
    text = {**both, "hidden_size": 16, "intermediate_size": 32, "vocab_size": size, "max_position_embeddings": CONTEXT}
    text |= {"bos_token_id": size - 2, "eos_token_id": size - 1}
    vision = {**both, "hidden_size": 20, "intermediate_size": 40, "image_size": 32, "patch_size": 8}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        network = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=width))
    network.save_pretrained(folder)
    return folder


# --- open_clip's CLIP, written down once more from its description ---------------------------------------------------


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp["c_proj"](nn.functional.gelu(self.mlp["c_fc"](self.ln_2(x))))


class Tower(nn.Module):
    def __init__(self, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads) for _ in range(layers))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Vision(nn.Module):
    def __init__(self, width: int, heads: int, layers: int, embed: int, size: int, patch: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn((size // patch) ** 2 + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Tower(width, heads, layers)
        self.proj = nn.Parameter(torch.randn(width, embed) / width**0.5)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class OpenClip(nn.Module):
    """Heads of 80 and 64, as in ViT-H-14; everything else is small."""

    def __init__(self, vocabulary: int, embed: int = 24) -> None:
        super().__init__()
        self.visual = Vision(160, 2, layers=3, embed=embed, size=28, patch=14)
        self.transformer = Tower(128, 2, layers=2)
        self.token_embedding = nn.Embedding(vocabulary, 128)
        self.positional_embedding = nn.Parameter(torch.randn(CONTEXT, 128))
        self.ln_final = nn.LayerNorm(128)
        self.text_projection = nn.Parameter(torch.randn(128, embed) / 128**0.5)
        self.logit_scale = nn.Parameter(torch.tensor(4.6))

    def forward(self, pixels: Tensor, ids: Tensor) -> Tensor:
        mask = torch.full((CONTEXT, CONTEXT), float("-inf")).triu(1)
        words = self.transformer(self.token_embedding(ids) + self.positional_embedding, mask)
        words = self.ln_final(words)[torch.arange(len(ids)), ids.argmax(dim=1)] @ self.text_projection
        return nn.functional.cosine_similarity(self.visual(pixels), words)


def open_clip(vocabulary: int) -> OpenClip:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return OpenClip(vocabulary).eval()
