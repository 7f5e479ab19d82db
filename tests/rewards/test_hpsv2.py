from __future__ import annotations

import sys

import pytest
import torch
from small_rewards import TEXTS, open_clip, write_tokenizer
from transformers import CLIPTokenizer
from worlds import asked

from aegpo.errors import AegpoError
from aegpo.rewards import hpsv2_package
from aegpo.rewards.clip_family import cleaned, load_words, padded
from aegpo.rewards.hpsv2 import FILES, Hpsv2Reward
from aegpo.rewards.hpsv2_checkpoint import architecture
from aegpo.testing import check_reward

CPU = torch.device("cpu")
PIECES = 518  # of the small tokenizer


@pytest.fixture(scope="module")
def reference():
    return open_clip(PIECES)


@pytest.fixture(scope="module")
def folder(reference, tmp_path_factory):
    """Tokenizer and checkpoints, the latter in the shape of the published ones."""
    folder = write_tokenizer(tmp_path_factory.mktemp("hps"))
    half = {name: tensor.half() for name, tensor in reference.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": half}, folder / FILES["v2.0"])
    torch.save({"epoch": 3, "state_dict": reference.state_dict()}, folder / FILES["v2.1"])
    return folder


def images(*shape: int) -> torch.Tensor:
    return torch.rand((len(TEXTS), 3, *(shape or (40, 30))), generator=torch.Generator().manual_seed(0))


def spec(folder, **changes) -> Hpsv2Reward:
    return Hpsv2Reward(**{"path": str(folder), "tokenizer": str(folder), **changes})


def broken(folder, tmp_path, **changes):
    """A checkpoint with tensors taken out (None) or put in."""
    tensors = torch.load(folder / FILES["v2.1"], weights_only=True)["state_dict"]
    for name, tensor in changes.items():
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor
    torch.save({"state_dict": tensors}, tmp_path / "broken.pt")
    return spec(folder, path=str(tmp_path / "broken.pt"))


def test_it_conforms(folder):
    check_reward(spec(folder), TEXTS[:4], size=(40, 30))


@pytest.mark.parametrize("shape", [(40, 30), (28, 28), (14, 33)])
def test_it_scores_as_open_clip_does_without_the_logit_scale(reference, folder, shape):
    words = load_words("test", str(folder), 77, clean=cleaned)
    with torch.no_grad():
        expected = reference(padded(images(*shape), 28), words(TEXTS))
    scores = spec(folder).build(CPU).score(images(*shape), asked(TEXTS))
    assert (scores - expected).abs().max() < 1e-6
    assert scores.std() > 1e-2


def test_the_version_chooses_the_file_and_half_precision_is_read(folder):
    one, other = (spec(folder, version=version).build(CPU).score(images(), asked(TEXTS)) for version in FILES)
    assert 0 < (one - other).abs().max() < 5e-3
    assert Hpsv2Reward().version == "v2.1"


def test_sizes_are_read_from_the_shapes_of_a_checkpoint():
    """The published network's, from its 13 telling shapes."""
    shapes = {
        "visual.conv1.weight": (1280, 3, 14, 14),
        "visual.positional_embedding": (257, 1280),
        "visual.proj": (1280, 1024),
        "token_embedding.weight": (49408, 1024),
        "positional_embedding": (77, 1024),
        "visual.transformer.resblocks.0.mlp.c_fc.bias": (5120,),
        "visual.transformer.resblocks.31.ln_1.bias": (1280,),
        "transformer.resblocks.0.mlp.c_fc.bias": (4096,),
        "transformer.resblocks.23.ln_1.bias": (1024,),
    }
    config = architecture("test", {name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
    vision, text = config["vision_config"], config["text_config"]
    assert (vision["num_hidden_layers"], vision["num_attention_heads"], vision["image_size"]) == (32, 16, 224)
    assert (text["num_hidden_layers"], text["num_attention_heads"], text["eos_token_id"]) == (24, 16, 49407)
    assert (vision["intermediate_size"], text["intermediate_size"], config["projection_dim"]) == (5120, 4096, 1024)
    assert vision["hidden_act"] == text["hidden_act"] == "gelu"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ln_final.bias": None}, "does not fit: is missing: text_model.final_layer_norm.bias"),
        ({"extra.weight": torch.zeros(1)}, "has an unknown key 'extra.weight'; open_clip's CLIP has none such"),
        ({"transformer.resblocks.0.ls_1.gamma": torch.zeros(128)}, "unknown key 'transformer.resblocks.0.ls_1.gamma'"),
        (
            {"visual.transformer.resblocks.1.ln_2.scale": torch.zeros(160)},
            "is unknown: vision_.*layer_norm2.scale",
        ),
        ({"visual.ln_post.bias": torch.zeros(159)}, r"another shape: vision_model.post_layernorm.bias \(159,\) for"),
        ({"visual.conv1.weight": None}, "is not of HPSv2's layout .*'visual.conv1.weight'"),
        ({"visual.positional_embedding": torch.zeros(6, 160)}, "not of HPSv2's architecture: 6 positions, widths 160"),
    ],
)
def test_a_checkpoint_with_other_keys_or_shapes_is_an_error(changes, message, folder, tmp_path):
    with pytest.raises(AegpoError, match=rf"reward 'hpsv2': the checkpoint .*{message}"):
        broken(folder, tmp_path, **changes).build(CPU)


def test_a_tokenizer_of_another_size_is_an_error(folder, tmp_path):
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(AegpoError, match="the tokenizer has 519 pieces, but the network 518"):
        spec(folder, tokenizer=str(tmp_path)).build(CPU)


def test_a_checkpoint_that_cannot_be_had_names_the_command_that_gets_it():
    with pytest.raises(AegpoError, match=r"'hf download xswu/HPSv2 HPS_v2.1_compressed.pt' once, or give 'path' a loc"):
        Hpsv2Reward().build(CPU)
    with pytest.raises(AegpoError, match=r"there is no file '/nowhere/HPS.pt'; give 'path' a file"):
        Hpsv2Reward(path="/nowhere/HPS.pt").build(CPU)


def test_a_tokenizer_that_cannot_be_had_names_the_command_that_gets_it(folder):
    with pytest.raises(AegpoError, match=r"'hf download laion/CLIP-ViT-H-14-laion2B-s32B-b79K' once, or give 'token"):
        Hpsv2Reward(path=str(folder)).build(CPU)


def test_without_ftfy_the_extra_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(AegpoError, match=r'ftfy, which is not installed; run  pip install "aegpo\[hpsv2\]"'):
        spec(folder).build(CPU)


def test_without_the_package_its_backend_names_the_command(folder, monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "meta_path", [])
    with pytest.raises(AegpoError, match=r"run  pip install --no-deps -r requirements/hpsv2.txt  \(the file lists hps"):
        hpsv2_package.import_hpsv2("reward 'hpsv2'")


def test_the_pins_are_those_of_the_requirements_file(pytestconfig):
    lines = (pytestconfig.rootpath / "requirements" / "hpsv2.txt").read_text().splitlines()
    assert tuple(line for line in lines if not line.startswith("#")) == hpsv2_package.PINS


def test_a_folder_without_a_tokenizer_is_an_error(folder, tmp_path):
    with pytest.raises(AegpoError, match=r"tokenizer '.*' has none of the files tokenizer.json, vocab.json, vocab.txt"):
        spec(folder, tokenizer=str(tmp_path)).build(CPU)
