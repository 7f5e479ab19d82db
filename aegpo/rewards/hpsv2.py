"""Reward `hpsv2`: Human Preference Score v2 (Wu et al. 2023, arXiv 2306.09341), batched and loaded once."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from aegpo.core.interfaces import Reward
from aegpo.errors import AegpoError
from aegpo.rewards.clip_family import LAION_HUGE, Clip, check_vocabulary, cleaned, load_words, padded
from aegpo.rewards.learned import LearnedReward, LearnedRewardSpec
from aegpo.rewards.weights import find_file, load_strictly, read_tensors

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import CLIPModel

FILES = {"v2.0": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}  # of xswu/HPSv2, as in hpsv2.utils
VISION_HEAD, TEXT_HEAD = 80, 64  # width of a head in ViT-H-14 (open_clip's configuration); shapes do not show it

_BLOCK = re.compile(r"(?P<tower>visual\.)?transformer\.resblocks\.(?P<layer>\d+)\.(?P<rest>.+)")
_IN_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_OUTSIDE = {
    "logit_scale": "logit_scale",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "visual.proj": "visual_projection.weight",  # transposed
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "text_projection": "text_projection.weight",  # transposed
}
_TRANSPOSED = ("visual.proj", "text_projection")


class Hpsv2Reward(LearnedRewardSpec):
    """Human Preference Score v2: the cosine of image and prompt, about 0.2 to 0.4, higher is better.

    A CLIP ViT-H-14 tuned on what people prefer. The logit scale is not applied, as in the hpsv2 package: `hpsv2.score`
    returns this number, `hpsv2.evaluate` prints 100 times it. The versions are different networks with different
    scales (v2.1 is the higher); name which one you report. The package's `score` takes v2.0 where nothing is said, its
    `evaluate` v2.1; here it is v2.1.

    `backend: transformers` needs nothing but this package and ftfy. `backend: package` scores with the network,
    tokenizer and transform of hpsv2 itself, image by image in 8 bits: the same to rounding, and slower.
    """

    kind: Literal["hpsv2"] = "hpsv2"
    version: Literal["v2.0", "v2.1"] = Field("v2.1", description="which network (hpsv2.score's default is v2.0)")
    path: str = Field("xswu/HPSv2", description="the checkpoint: a file, a folder or a repository of the hub")
    tokenizer: str = Field(
        LAION_HUGE, description="CLIP's tokenizer: a folder or a repository of the hub; backend 'package' has its own"
    )
    backend: Literal["transformers", "package"] = Field(
        "transformers", description="whose code scores: transformers' CLIP, or the hpsv2 package"
    )

    def build(self, device: torch.device) -> Reward:
        """Loads checkpoint and tokenizer.

        Raises:
            AegpoError: if they cannot be had or do not fit, or the hpsv2 package is wanted and not installed.
        """
        who = f"reward {self.label!r}"
        tensors = read_tensors(who, find_file(who, self.path, FILES[self.version]))
        if self.backend == "package":
            from aegpo.rewards.hpsv2_package import PackageScorer

            scorer = PackageScorer(who, tensors)
            return LearnedReward(self, scorer.network, scorer.score, device)
        cleaned("")  # says what is missing before the network is built
        network = to_clip(who, tensors)
        words = load_words(who, self.tokenizer, network.config.text_config.max_position_embeddings, clean=cleaned)
        check_vocabulary(who, words, network)
        clip = Clip(network, words, padded)

        def score(images: Tensor, prompts: Sequence[str]) -> Tensor:  # (b, 3, h, w), b prompts -> (b,)
            return clip.cosine(images, prompts)

        return LearnedReward(self, network, score, device)


def to_clip(who: str, tensors: Mapping[str, Tensor]) -> CLIPModel:
    """transformers' CLIP with the weights of a checkpoint in open_clip's layout; sizes are read from its shapes.

    Raises:
        AegpoError: if a key is missing or unknown, or the shapes are not those of such a network.
    """
    from accelerate import init_empty_weights
    from transformers import CLIPConfig, CLIPModel

    config = CLIPConfig(**architecture(who, tensors))
    with init_empty_weights():
        network = CLIPModel(config)
    load_strictly(who, network, renamed(who, tensors))
    return network


def architecture(who: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments of CLIPConfig, read from the shapes of a checkpoint in open_clip's layout."""
    try:
        width, _, patch, _ = tensors["visual.conv1.weight"].shape
        positions, embed = len(tensors["visual.positional_embedding"]), tensors["visual.proj"].shape[1]
        vocabulary, text_width = tensors["token_embedding.weight"].shape
        context = len(tensors["positional_embedding"])
        inner = len(tensors["visual.transformer.resblocks.0.mlp.c_fc.bias"])
        text_inner = len(tensors["transformer.resblocks.0.mlp.c_fc.bias"])
    except (KeyError, ValueError, IndexError) as error:
        raise AegpoError(
            f"{who}: the checkpoint is not of HPSv2's layout (open_clip's CLIP with a vision transformer): {error}"
        ) from error
    side = round((positions - 1) ** 0.5)
    if side**2 != positions - 1 or width % VISION_HEAD or text_width % TEXT_HEAD:
        raise AegpoError(
            f"{who}: the checkpoint is not of HPSv2's architecture: {positions} positions, widths {width} and "
            f"{text_width}; a square grid and one, and heads of {VISION_HEAD} and {TEXT_HEAD}, were expected"
        )
    layers = {bool(match["tower"]): 0 for match in _blocks(tensors)}
    for match in _blocks(tensors):
        layers[bool(match["tower"])] = max(layers[bool(match["tower"])], int(match["layer"]) + 1)
    common = {"hidden_act": "gelu", "projection_dim": embed}
    vision = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers[True]}
    vision |= {"num_attention_heads": width // VISION_HEAD, "image_size": side * patch, "patch_size": patch}
    text = {"hidden_size": text_width, "intermediate_size": text_inner, "num_hidden_layers": layers[False]}
    text |= {"num_attention_heads": text_width // TEXT_HEAD, "vocab_size": vocabulary}
    text |= {"max_position_embeddings": context, "bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1}
    return {"vision_config": vision | common, "text_config": text | common, "projection_dim": embed}


def renamed(who: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint in open_clip's layout under transformers' names; every key is consumed.

    Raises:
        AegpoError: for a key that has no place there.
    """
    converted: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        match = _BLOCK.fullmatch(name)
        if name in _OUTSIDE:
            converted[_OUTSIDE[name]] = tensor.T.contiguous() if name in _TRANSPOSED else tensor
        elif match is not None:
            converted |= _block(match, tensor, name, who)
        else:
            raise AegpoError(f"{who}: the checkpoint has an unknown key {name!r}; open_clip's CLIP has none such")
    return converted


def _block(match: re.Match[str], tensor: Tensor, name: str, who: str) -> dict[str, Tensor]:
    """One tensor of a transformer block; attention's joint projection becomes three."""
    tower = "vision_model" if match["tower"] else "text_model"
    where, (module, _, part) = f"{tower}.encoder.layers.{match['layer']}", match["rest"].rpartition(".")
    if match["rest"] in ("attn.in_proj_weight", "attn.in_proj_bias"):
        kind = match["rest"].removeprefix("attn.in_proj_")
        thirds = tensor.chunk(3)
        return {f"{where}.self_attn.{letter}_proj.{kind}": t for letter, t in zip("qkv", thirds, strict=True)}
    if module not in _IN_BLOCK:
        raise AegpoError(f"{who}: the checkpoint has an unknown key {name!r}; open_clip's CLIP has none such")
    return {f"{where}.{_IN_BLOCK[module]}.{part}": tensor}


def _blocks(tensors: Mapping[str, Tensor]) -> list[re.Match[str]]:
    return [match for name in tensors if (match := _BLOCK.fullmatch(name))]
