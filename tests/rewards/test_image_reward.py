"""ImageReward against its own definition, written down once more in plain torch."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import BertTokenizer
from worlds import asked

from aegpo.errors import AegpoError
from aegpo.rewards.clip_family import cropped_by_torchvision
from aegpo.rewards.image_reward import CONTEXT, MEAN, STD, ImageRewardReward, architecture
from aegpo.testing import check_reward

CPU = torch.device("cpu")
WORDS = ["a", "red", "cube", "on", "the", "table", "cat", "dogs", "42", ",", "!"]
PROMPTS = ["a red cube", "A Cat on the TABLE, 42 dogs!", "the " * 60, "cube"]
WIDTH = 128  # two heads of 64


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:  # (b, n, WIDTH)
    heads = [part.unflatten(2, (-1, 64)).transpose(1, 2) for part in (query, key, value)]
    weights = heads[0] @ heads[1].transpose(2, 3) / 8
    weights = weights if mask is None else weights.masked_fill(~mask[:, None, None].bool(), float("-inf"))
    return (weights.softmax(-1) @ heads[2]).transpose(1, 2).flatten(2)


class Part(nn.Module):
    """A module of named parts."""

    def __init__(own, /, **parts: nn.Module) -> None:
        nn.Module.__init__(own)
        for name, part in parts.items():
            own.add_module(name, part)


class VisionBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH, 1e-6), nn.LayerNorm(WIDTH, 1e-6)
        self.attn = Part(qkv=nn.Linear(WIDTH, 3 * WIDTH), proj=nn.Linear(WIDTH, WIDTH))
        self.mlp = Part(fc1=nn.Linear(WIDTH, 200), fc2=nn.Linear(200, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn.proj(attend(*self.attn.qkv(self.norm1(x)).chunk(3, dim=2)))
        return x + self.mlp.fc2(nn.functional.gelu(self.mlp.fc1(self.norm2(x))))


class Vision(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.pos_embed = nn.Parameter(torch.randn(1, 5, WIDTH))
        self.patch_embed = Part(proj=nn.Conv2d(3, WIDTH, 16, 16))
        self.blocks = nn.ModuleList(VisionBlock() for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH, 1e-6)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patch_embed.proj(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def bert_attention() -> Part:
    inner = Part(query=nn.Linear(WIDTH, WIDTH), key=nn.Linear(WIDTH, WIDTH), value=nn.Linear(WIDTH, WIDTH))
    return Part(**{"self": inner, "output": Part(dense=nn.Linear(WIDTH, WIDTH), LayerNorm=nn.LayerNorm(WIDTH, 1e-12))})


def bert_attend(part: Part, x: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
    inner = part._modules["self"]
    seen = attend(inner.query(x), inner.key(context), inner.value(context), mask)
    return part.output.LayerNorm(part.output.dense(seen) + x)


class TextLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.crossattention = bert_attention(), bert_attention()
        self.intermediate = Part(dense=nn.Linear(WIDTH, 150))
        self.output = Part(dense=nn.Linear(150, WIDTH), LayerNorm=nn.LayerNorm(WIDTH, 1e-12))

    def forward(self, x: Tensor, mask: Tensor, image: Tensor) -> Tensor:
        x = bert_attend(self.attention, x, x, mask)
        x = bert_attend(self.crossattention, x, image, None)
        return self.output.LayerNorm(self.output.dense(nn.functional.gelu(self.intermediate.dense(x))) + x)


class Text(nn.Module):
    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.embeddings = Part(
            word_embeddings=nn.Embedding(vocabulary, WIDTH),
            position_embeddings=nn.Embedding(40, WIDTH),
            LayerNorm=nn.LayerNorm(WIDTH, 1e-12),
        )
        self.encoder = Part(layer=nn.ModuleList(TextLayer() for _ in range(3)))

    def forward(self, ids: Tensor, mask: Tensor, image: Tensor) -> Tensor:
        x = self.embeddings.word_embeddings(ids) + self.embeddings.position_embeddings.weight[: ids.shape[1]]
        x = self.embeddings.LayerNorm(x)
        for layer in self.encoder.layer:
            x = layer(x, mask, image)
        return x[:, 0]


class ImageReward(nn.Module):
    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.blip = Part(
            visual_encoder=Vision(),
            text_encoder=Text(vocabulary),
            vision_proj=nn.Linear(WIDTH, 256),
            text_proj=nn.Linear(WIDTH, 256),
        )
        self.mlp = Part(layers=nn.Sequential(nn.Linear(WIDTH, 12), nn.Dropout(0.2), nn.Linear(12, 1)))

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        features = self.blip.text_encoder(ids, mask, self.blip.visual_encoder(pixels))
        return (self.mlp.layers(features).squeeze(1) - MEAN) / STD


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("image-reward")
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    BertTokenizer(vocab={piece: index for index, piece in enumerate(pieces)}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reference(folder) -> ImageReward:
    with torch.random.fork_rng():
        torch.manual_seed(4)
        network = ImageReward(vocabulary=18).eval()
    position_ids = {"blip.text_encoder.embeddings.position_ids": torch.arange(40)[None]}
    torch.save(network.state_dict() | position_ids, folder / "ImageReward.pt")
    return network


def spec(folder, **changes) -> ImageRewardReward:
    return ImageRewardReward(**{"path": str(folder), "tokenizer": str(folder), **changes})


def test_it_conforms(folder, reference):
    check_reward(spec(folder), PROMPTS, size=(40, 30))


def test_it_scores_as_published(folder, reference):
    images = torch.rand((4, 3, 48, 40), generator=torch.Generator().manual_seed(0))
    tokenizer = BertTokenizer.from_pretrained(folder)
    words = tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=CONTEXT, return_tensors="pt")
    with torch.no_grad():
        expected = reference(cropped_by_torchvision(images, 32), words["input_ids"], words["attention_mask"])
    scores = spec(folder).build(CPU).score(images, asked(PROMPTS))
    assert torch.allclose(scores, expected, atol=1e-5)
    assert scores.std() > 1e-3
    assert tokenizer.convert_ids_to_tokens(words["input_ids"][1])[:4] == ["[CLS]", "a", "cat", "on"]


@pytest.mark.parametrize(("margin", "left"), [(1, 0), (2, 1), (3, 2), (5, 2), (7, 4)])
def test_odd_margins_are_cut_as_by_centercrop_of_torchvision(margin, left, folder, reference):
    images = torch.rand((4, 3, 32, 32 + margin), generator=torch.Generator().manual_seed(0))
    reward, middle = spec(folder).build(CPU), images[..., left : left + 32]
    for given, expected in ((images, middle), (images.mT, middle.mT)):
        assert torch.allclose(*(reward.score(each, asked(PROMPTS)) for each in (given, expected)), atol=1e-6)


def test_sizes_are_read_from_the_shapes_of_a_checkpoint():
    eye, reader = "blip.visual_encoder", "blip.text_encoder"
    shapes = {
        f"{eye}.patch_embed.proj.weight": (1024, 3, 16, 16),
        f"{eye}.pos_embed": (1, 197, 1024),
        f"{eye}.blocks.0.mlp.fc1.bias": (4096,),
        f"{eye}.blocks.23.norm1.bias": (1024,),
        f"{reader}.embeddings.word_embeddings.weight": (30524, 768),
        f"{reader}.embeddings.position_embeddings.weight": (512, 768),
        f"{reader}.encoder.layer.0.intermediate.dense.bias": (3072,),
        f"{reader}.encoder.layer.11.output.dense.bias": (768,),
    }
    vision, text = architecture("x", {name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
    assert (vision["num_hidden_layers"], vision["num_attention_heads"], vision["image_size"]) == (24, 16, 224)
    assert (text["num_hidden_layers"], text["num_attention_heads"], text["encoder_hidden_size"]) == (12, 12, 1024)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("blip.visual_encoder.norm.bias", None, "does not fit: is missing: vision.post_layernorm.bias"),
        ("mlp.layers.2.bias", None, "does not fit: is missing: 1.bias"),
        ("blip.visual_encoder.head.bias", torch.zeros(1), "unknown key 'blip.visual_encoder.head.bias'; ImageReward"),
        ("blip.text_encoder.pooler.bias", torch.zeros(1), "does not fit: is unknown: text.pooler.bias"),
        ("blip.visual_encoder.pos_embed", torch.zeros(1, 7, WIDTH), "architecture: 7 positions, widths 128 and 128"),
        ("blip.visual_encoder.pos_embed", None, "not of ImageReward's layout .*'blip.visual_encoder.pos_embed'"),
        ("mlp.layers.0.weight", torch.zeros(12, 5), "the head takes 5 features, but BERT has 128"),
    ],
)
def test_a_checkpoint_with_other_keys_or_shapes_is_an_error(name, tensor, message, folder, reference, tmp_path):
    tensors = torch.load(folder / "ImageReward.pt", weights_only=True)
    tensors.pop(name, None)
    torch.save(tensors if tensor is None else tensors | {name: tensor}, tmp_path / "broken.pt")
    with pytest.raises(AegpoError, match=rf"reward 'image-reward': .*{message}"):
        spec(folder, path=str(tmp_path / "broken.pt")).build(CPU)


def test_a_tokenizer_with_more_pieces_than_the_network_is_an_error(folder, reference, tmp_path):
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{index}" for index in range(20))]
    BertTokenizer(vocab={piece: index for index, piece in enumerate(pieces)}).save_pretrained(tmp_path)
    with pytest.raises(AegpoError, match="the tokenizer has 25 pieces, but the network reads 18"):
        spec(folder, tokenizer=str(tmp_path)).build(CPU)


def test_a_checkpoint_that_cannot_be_had_names_the_command_that_gets_it(folder):
    with pytest.raises(AegpoError, match=re.escape("'hf download THUDM/ImageReward ImageReward.pt' once")):
        ImageRewardReward(tokenizer=str(folder)).build(CPU)
