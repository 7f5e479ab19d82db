"""Parity with the hpsv2 package itself, where it is installed: `nox -s hpsv2`, and a stage of CI."""

from __future__ import annotations

import gzip
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPTokenizer

if importlib.util.find_spec("hpsv2") is None:  # to import it takes the bridge: the package misses a dependency
    pytest.skip("pip install --no-deps -r requirements/hpsv2.txt", allow_module_level=True)

from worlds import asked

from aegpo.rewards.clip_family import cleaned, load_words
from aegpo.rewards.hpsv2 import FILES, Hpsv2Reward
from aegpo.rewards.hpsv2_package import import_hpsv2

CPU = torch.device("cpu")
PROMPTS = [
    "a red cube",
    "A cat's paw &amp; 42 DOGS,  on\ta table!",
    "caf\u00e9 \u201cna\u00efve\u201d \u65e5\u672c \u00e2\u20ac\u2122 \ufb01g \ufb00",
    "a very long prompt, " * 40,
    "",
    "&lt;b&gt; 3.14 don't we'll I'd",
]
# None that is oblong with its longest side at the network's size: the package does not pad those, and fails
SHAPES = [(40, 40), (56, 56), (70, 40), (33, 90), (57, 20), (224, 224)]


@pytest.fixture(scope="module")
def open_clip():
    return import_hpsv2("test")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> str:
    """transformers' tokenizer of CLIP's real vocabulary, from the file that open_clip_torch ships."""
    found = importlib.util.find_spec("open_clip")
    packed = (Path(found.origin).parent / "bpe_simple_vocab_16e6.txt.gz").read_bytes()
    lines = gzip.decompress(packed).decode().split("\n")
    merges = [tuple(line.split()) for line in lines[1 : 49152 - 256 - 2 + 1]]
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(merge) for merge in merges)]
    vocabulary = {piece: index for index, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    folder = tmp_path_factory.mktemp("tokenizer")
    CLIPTokenizer(vocab=vocabulary, merges=merges).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def network(open_clip, tmp_path_factory):
    """A small network that the package itself makes, its transform, and a folder with its checkpoint."""
    folder = tmp_path_factory.mktemp("package")
    vision = {"image_size": 56, "layers": 2, "width": 160, "head_width": 80, "patch_size": 14}
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2}
    config = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}
    (folder / "small-hps.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    torch.manual_seed(0)
    model, _, transform = open_clip.create_model_and_transforms(
        "small-hps", None, precision="amp", device="cpu", light_augmentation=True, output_dict=True
    )  # what hpsv2.img_score asks for
    torch.save({"state_dict": model.state_dict()}, folder / FILES["v2.1"])
    return model, transform, folder


def pictures() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.rand((1, 3, *shape), generator=generator) * 255).round() / 255 for shape in SHAPES]


def test_tokens_are_those_of_the_package(open_clip, tokenizer):
    ours = load_words("test", tokenizer, 77, clean=cleaned)(PROMPTS)
    assert torch.equal(ours, open_clip.tokenize(PROMPTS))


def test_both_backends_score_the_same(network, tokenizer):
    folder = str(network[2])
    ours = Hpsv2Reward(path=folder, tokenizer=tokenizer).build(CPU)
    theirs = Hpsv2Reward(path=folder, backend="package").build(CPU)
    for picture, prompt in zip(pictures(), PROMPTS, strict=True):
        mine, yours = ours.score(picture, asked([prompt])), theirs.score(picture, asked([prompt]))
        assert (mine - yours).abs().max() < 1e-6, (picture.shape, prompt)


def test_both_backends_are_what_the_package_scores(network, tokenizer, monkeypatch):
    """`hpsv2.img_score.score` on files in memory; its network is put where it would download another one to."""
    from hpsv2 import img_score

    model, transform, folder = network
    monkeypatch.setattr(img_score, "model_dict", {"model": model, "preprocess_val": transform})
    images = torch.cat([pictures()[0], pictures()[0].flip(3), 1 - pictures()[0]])
    files = [Image.fromarray((image.permute(1, 2, 0) * 255).round().byte().numpy()) for image in images]
    theirs = img_score.score(files, PROMPTS[1], cp=str(folder / FILES["v2.1"]))
    for backend in ("transformers", "package"):
        spec = Hpsv2Reward(path=str(folder), tokenizer=tokenizer, backend=backend)
        ours = spec.build(CPU).score(images, asked([PROMPTS[1]] * 3))
        assert np.abs(ours.numpy() - np.array(theirs)).max() < 1e-6


@pytest.mark.slow
def test_importing_it_leaves_the_other_libraries_as_they_were():
    code = """
import sys
from aegpo.rewards.hpsv2_package import import_hpsv2
import_hpsv2("test")
assert not {"torchvision", "turtle", "clint"} & set(sys.modules), "a stand-in was left behind"
from transformers import CLIPModel, CLIPImageProcessor
from diffusers import StableDiffusion3Pipeline, FluxPipeline
import peft, gzip
assert gzip.open.__module__ == "gzip"
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=200)
