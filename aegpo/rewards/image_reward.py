"""Reward `image-reward`: ImageReward (Xu et al. 2023, arXiv 2304.05977), on transformers' BLIP."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

from pydantic import Field

from aegpo.core.places import LocalOrHub
from aegpo.errors import AegpoError
from aegpo.rewards.aesthetic import linear_layers
from aegpo.rewards.clip_family import cropped_by_torchvision
from aegpo.rewards.learned import LearnedReward, LearnedRewardSpec
from aegpo.rewards.weights import TOKENIZER_FILES, find_file, find_folder, load_pretrained, load_strictly, read_tensors

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the published scores (ImageReward.py)
CONTEXT = 35  # word pieces of a prompt that are read (ImageReward.py)
HEAD = 64  # width of an attention head, in ViT-L/16 and in BERT-base; shapes do not show it

_UNUSED = re.compile(r"blip\.(vision_proj|text_proj)\.(weight|bias)|blip\.text_encoder\.embeddings\.position_ids")
_VISION = (  # BLIP's names and transformers'
    (r"cls_token", r"embeddings.class_embedding"),
    (r"pos_embed", r"embeddings.position_embedding"),
    (r"patch_embed\.proj\.(\w+)", r"embeddings.patch_embedding.\1"),
    (r"blocks\.(\d+)\.norm1\.(\w+)", r"encoder.layers.\1.layer_norm1.\2"),
    (r"blocks\.(\d+)\.norm2\.(\w+)", r"encoder.layers.\1.layer_norm2.\2"),
    (r"blocks\.(\d+)\.attn\.qkv\.(\w+)", r"encoder.layers.\1.self_attn.qkv.\2"),
    (r"blocks\.(\d+)\.attn\.proj\.(\w+)", r"encoder.layers.\1.self_attn.projection.\2"),
    (r"blocks\.(\d+)\.mlp\.(fc[12])\.(\w+)", r"encoder.layers.\1.mlp.\2.\3"),
    (r"norm\.(\w+)", r"post_layernorm.\1"),
)


class ImageRewardReward(LearnedRewardSpec):
    """ImageReward: what people prefer, standardised: about -2.3 to 2, 0 on average, higher is better.

    BLIP (ViT-L/16 and BERT-base with cross-attention) and a head, tuned on comparisons of images of one prompt. Only
    the first 35 word pieces of a prompt are read, as published. The image-reward package pins timm 0.6.13 and
    fairscale and cannot be imported beside today's transformers; its checkpoint is read here without it.
    """

    kind: Literal["image-reward"] = "image-reward"
    path: LocalOrHub = Field(
        "THUDM/ImageReward", description="the checkpoint: a file, a folder or a repository of the hub"
    )
    filename: str = Field("ImageReward.pt", description="the checkpoint's file in a folder or repository")
    tokenizer: LocalOrHub = Field(
        "bert-base-uncased", description="BERT's tokenizer: a folder or a repository of the hub"
    )

    def build(self, device: torch.device) -> LearnedReward:
        """Loads checkpoint and tokenizer.

        Raises:
            AegpoError: if they cannot be had or do not fit.
        """
        import torch

        who = f"reward {self.label!r}"
        network = to_blip(who, read_tensors(who, find_file(who, self.path, self.filename)))
        vision, text, head = (cast(Any, network[name]) for name in ("vision", "text", "head"))
        tokenizer = load_words(who, self.tokenizer, text.config.vocab_size)

        def score(images: Tensor, texts: Sequence[str]) -> Tensor:  # (b, 3, h, w), b texts -> (b,)
            fields: Any = {"padding": "max_length", "truncation": True, "max_length": CONTEXT, "return_tensors": "pt"}
            words = tokenizer(list(texts), **fields).to(images.device)
            pixels = cropped_by_torchvision(images, vision.config.image_size).to(vision.dtype)
            seen = vision(pixel_values=pixels).last_hidden_state
            read = text(
                input_ids=words["input_ids"],
                attention_mask=words["attention_mask"],
                encoder_hidden_states=seen,
                encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.int64, device=seen.device),
            ).last_hidden_state[:, 0]
            rated: Tensor = head(read).float().squeeze(1)
            return (rated - MEAN) / STD

        return LearnedReward(self, network, score, device)


def load_words(who: str, source: str, vocabulary: int) -> Any:
    """BERT's tokenizer, from a folder or the hub.

    Raises:
        AegpoError: if it cannot be had, or has more pieces than the network.
    """
    from transformers import BertTokenizer

    folder = find_folder(who, source, TOKENIZER_FILES, "tokenizer")
    tokenizer = load_pretrained(who, BertTokenizer.from_pretrained, str(folder), "tokenizer")
    if len(tokenizer) > vocabulary:
        raise AegpoError(f"{who}: the tokenizer has {len(tokenizer)} pieces, but the network reads {vocabulary}")
    return tokenizer


def to_blip(who: str, tensors: Mapping[str, Tensor]) -> nn.ModuleDict:
    """`vision`, `text` and `head` with the weights of a published checkpoint; sizes are read from its shapes.

    Raises:
        AegpoError: if a key is missing or unknown, or the shapes are not those of such a network.
    """
    from accelerate import init_empty_weights
    from torch import nn
    from transformers import BlipTextConfig, BlipVisionConfig, BlipVisionModel
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    vision, text = architecture(who, tensors)
    with init_empty_weights():
        towers = nn.ModuleDict(
            {
                "vision": BlipVisionModel(BlipVisionConfig(**vision)),
                "text": BlipTextModel(BlipTextConfig(**text), add_pooling_layer=False),
            }
        )
    converted, head = renamed(who, tensors)
    load_strictly(who, towers, converted)
    layers = linear_layers(who, head)
    if layers[0].in_features != text["hidden_size"]:
        raise AegpoError(f"{who}: the head takes {layers[0].in_features} features, but BERT has {text['hidden_size']}")
    return nn.ModuleDict({**towers, "head": layers})


def architecture(who: str, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of BlipVisionConfig and BlipTextConfig, read from the shapes of a published checkpoint."""
    eye, reader = "blip.visual_encoder", "blip.text_encoder"
    try:
        width, _, patch, _ = tensors[f"{eye}.patch_embed.proj.weight"].shape
        positions, inner = tensors[f"{eye}.pos_embed"].shape[1], len(tensors[f"{eye}.blocks.0.mlp.fc1.bias"])
        vocabulary, text_width = tensors[f"{reader}.embeddings.word_embeddings.weight"].shape
        context = len(tensors[f"{reader}.embeddings.position_embeddings.weight"])
        text_inner = len(tensors[f"{reader}.encoder.layer.0.intermediate.dense.bias"])
    except (KeyError, ValueError, IndexError) as error:
        raise AegpoError(f"{who}: the checkpoint is not of ImageReward's layout (BLIP and a head): {error}") from error
    side = round((positions - 1) ** 0.5)
    if side**2 != positions - 1 or width % HEAD or text_width % HEAD or context < CONTEXT:
        raise AegpoError(
            f"{who}: the checkpoint is not of ImageReward's architecture: {positions} positions, widths {width} and "
            f"{text_width}, {context} words; a square grid and one, heads of {HEAD}, and {CONTEXT} words were expected"
        )
    vision: dict[str, Any] = {"hidden_size": width, "intermediate_size": inner, "num_attention_heads": width // HEAD}
    vision |= {"num_hidden_layers": _count(tensors, f"{eye}.blocks"), "image_size": side * patch, "patch_size": patch}
    vision |= {"hidden_act": "gelu", "layer_norm_eps": 1e-6}  # BLIP's vit.py
    text = {"hidden_size": text_width, "intermediate_size": text_inner, "num_attention_heads": text_width // HEAD}
    text |= {"num_hidden_layers": _count(tensors, f"{reader}.encoder.layer"), "vocab_size": vocabulary}
    text |= {"encoder_hidden_size": width, "max_position_embeddings": context, "is_decoder": True}
    return vision, text | {"hidden_act": "gelu", "layer_norm_eps": 1e-12}  # med_config.json


def renamed(who: str, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A published checkpoint under transformers' names, and the head's layers; every key is consumed or known unused.

    Raises:
        AegpoError: for a key that has no place.
    """
    towers: dict[str, Tensor] = {}
    head: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.startswith("mlp."):
            head[name.removeprefix("mlp.")] = tensor
        elif _UNUSED.fullmatch(name):
            continue  # projections of BLIP's contrastive loss, and a buffer of old versions of BERT
        elif name.startswith("blip.text_encoder."):
            towers["text." + name.removeprefix("blip.text_encoder.")] = tensor
        else:
            towers["vision." + _vision_name(who, name)] = tensor
    return towers, head


def _vision_name(who: str, name: str) -> str:
    for pattern, new in _VISION:
        match = re.fullmatch(rf"blip\.visual_encoder\.{pattern}", name)
        if match is not None:
            return match.expand(new)
    raise AegpoError(f"{who}: the checkpoint has an unknown key {name!r}; ImageReward has none such")


def _count(tensors: Mapping[str, Tensor], prefix: str) -> int:
    """How many numbered modules there are below `prefix`."""
    numbers = [match[1] for name in tensors if (match := re.match(rf"{re.escape(prefix)}\.(\d+)\.", name))]
    return max(int(number) for number in numbers) + 1
