from __future__ import annotations

import re
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from small_rewards import CONTEXT, TEXTS, write_clip, write_tokenizer
from torch import nn
from transformers import CLIPModel, CLIPTokenizer
from worlds import asked

from aegpo.errors import AegpoError
from aegpo.rewards.aesthetic import AestheticReward
from aegpo.rewards.clip import ClipReward
from aegpo.rewards.clip_family import cropped, load_words, padded
from aegpo.rewards.pickscore import PickScoreReward
from aegpo.testing import check_reward

CPU = torch.device("cpu")
PROMPTS = TEXTS[:4]


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> str:
    return str(write_clip(tmp_path_factory.mktemp("clip")))


@pytest.fixture(scope="module")
def head(tmp_path_factory) -> str:
    """The predictor's own module tree, for 24 features."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        widths = [24, 12, 8, 1]
        layers: list[nn.Module] = []
        for inward, outward in pairwise(widths):
            layers += [nn.Linear(inward, outward), nn.Dropout(0.2)]
        module = nn.ModuleDict({"layers": nn.Sequential(*layers[:-1])})
    path = tmp_path_factory.mktemp("head") / "aesthetic-model.pth"
    torch.save(module.state_dict(), path)
    return str(path)


def images(size: int = 40, count: int = 4) -> torch.Tensor:
    """Whole grey levels, so that a processor's bytes are the same pixels."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand((count, 3, 5, 5), generator=generator)
    smooth = nn.functional.interpolate(coarse, (size, size), mode="bilinear")
    return (smooth * 255).round() / 255


def pictures(pixels: torch.Tensor) -> list[Image.Image]:
    return [Image.fromarray((image.permute(1, 2, 0) * 255).round().byte().numpy()) for image in pixels]


def reference(clip: str, pixels: torch.Tensor, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor, CLIPModel]:
    """Normalised features of images and prompts, as the model cards compute them."""
    network, tokenizer = CLIPModel.from_pretrained(clip).eval(), CLIPTokenizer.from_pretrained(clip)
    words = tokenizer(prompts, padding=True, truncation=True, max_length=CONTEXT, return_tensors="pt")
    with torch.no_grad():
        outputs = network(pixel_values=pixels, **words)
    return outputs.image_embeds, outputs.text_embeds, network


@pytest.mark.parametrize("kind", ["clip", "pickscore", "aesthetic"])
def test_every_reward_of_the_family_conforms(kind, clip, head):
    specs = {
        "clip": ClipReward(path=clip),
        "pickscore": PickScoreReward(path=clip, tokenizer=clip),
        "aesthetic": AestheticReward(path=head, clip=clip),
    }
    check_reward(specs[kind], PROMPTS, size=(40, 30))


def test_clip_is_a_hundred_times_the_cosine(clip):
    pixels = images(32)
    seen, read, _ = reference(clip, cropped(pixels, 32), PROMPTS)
    scores = ClipReward(path=clip).build(CPU).score(pixels, asked(PROMPTS))
    assert torch.allclose(scores, 100 * (seen * read).sum(1), atol=1e-4)
    assert torch.allclose(
        ClipReward(path=clip, factor=1).build(CPU).score(pixels, asked(PROMPTS)), scores / 100, atol=1e-6
    )


def test_pickscore_is_the_logit_of_the_model_card(clip):
    pixels = images(32)
    seen, read, network = reference(clip, cropped(pixels, 32), PROMPTS)
    card = torch.diag(network.logit_scale.exp() * seen @ read.T)
    spec = PickScoreReward(path=clip, tokenizer=clip)
    assert torch.allclose(spec.build(CPU).score(pixels, asked(PROMPTS)), card, atol=1e-5)
    divided = spec.model_copy(update={"divisor": 26.0}).build(CPU).score(pixels, asked(PROMPTS))
    assert torch.allclose(divided, card / 26, atol=1e-6)


def test_aesthetic_is_the_head_on_normalised_features(clip, head):
    pixels = images(32)
    seen, _, _ = reference(clip, cropped(pixels, 32), PROMPTS)
    weights = torch.load(head, weights_only=True)
    for place in (0, 2, 4):
        seen = seen @ weights[f"layers.{place}.weight"].T + weights[f"layers.{place}.bias"]
    scores = AestheticReward(path=head, clip=clip).build(CPU).score(pixels, asked(PROMPTS))
    assert torch.allclose(scores, seen.squeeze(1), atol=1e-6)
    assert torch.equal(scores, AestheticReward(path=head, clip=clip).build(CPU).score(pixels, asked(PROMPTS[::-1])))


def test_a_single_layer_is_a_head_too(clip, tmp_path):
    layer = nn.Linear(24, 1)
    torch.save(layer.state_dict(), tmp_path / "linear.pth")
    seen, _, _ = reference(clip, cropped(images(32), 32), PROMPTS)
    spec = AestheticReward(path=str(tmp_path), filename="linear.pth", clip=clip)
    assert torch.allclose(spec.build(CPU).score(images(32), asked(PROMPTS)), layer(seen).squeeze(1), atol=1e-6)


def test_cropping_is_what_the_processor_of_transformers_does(clip):
    for shape in ((40, 40), (50, 37), (33, 64)):
        pixels = nn.functional.interpolate(images(64), shape, mode="bilinear")
        pixels = (pixels * 255).round() / 255
        given = _processor()(pictures(pixels), return_tensors="pt")["pixel_values"]
        grey_level = 1 / 255 / 0.26  # of normalised pixels
        assert (cropped(pixels, 32) - given).abs().max() <= 2.1 * grey_level


@pytest.mark.parametrize(("margin", "even"), [(1, 0), (2, 1), (3, 2), (5, 2), (7, 4)])
@pytest.mark.parametrize("turned", [False, True], ids=["wide", "tall"])
def test_odd_margins_are_cut_as_in_the_original_of_each_reward(clip, head, margin, even, turned):
    pixels = images(64)[:, :, :32, : 32 + margin]
    specs = [  # with the pixels that the original cuts off on the left
        (ClipReward(path=clip), margin // 2),  # transformers' processor
        (PickScoreReward(path=clip, tokenizer=clip), margin // 2),  # of the model card: transformers' processor
        (AestheticReward(path=head, clip=clip), even),  # of clip.load: CenterCrop of torchvision
    ]
    for spec, left in specs:
        middle, reward = pixels[..., left : left + 32], spec.build(CPU)
        given, expected = (each.mT if turned else each for each in (pixels, middle))
        assert torch.allclose(*(reward.score(each, asked(PROMPTS)) for each in (given, expected)), atol=1e-6)


def _processor():
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    return CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


@pytest.mark.parametrize("shape", [(40, 40), (20, 40), (64, 31), (28, 28), (28, 9), (10, 10)])
def test_padding_keeps_the_whole_image_centred_on_black(shape):
    pixels = torch.ones((1, 3, *shape))
    given = padded(pixels, 28)
    assert given.shape == (1, 3, 28, 28)
    black = padded(torch.zeros((1, 3, 28, 28)), 28)[0, :, 0, 0]
    white = padded(torch.ones((1, 3, 28, 28)), 28)[0, :, 0, 0]
    height, width = (round(side * 28 / max(shape)) for side in shape)
    top, left = (28 - height) // 2, (28 - width) // 2
    inside = given[0, :, top : top + height, left : left + width]
    assert torch.allclose(inside, white[:, None, None].expand_as(inside), atol=1e-5)
    outside = given.clone()
    outside[0, :, top : top + height, left : left + width] = black[:, None, None]
    assert torch.equal(outside, black[None, :, None, None].expand_as(outside))


def test_words_are_cut_ended_and_followed_by_zeros(tmp_path):
    words = load_words("test", str(write_tokenizer(tmp_path)), CONTEXT)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    ids = words(TEXTS)
    assert ids.shape == (len(TEXTS), CONTEXT)
    for row, text in zip(ids, TEXTS, strict=True):
        given = tokenizer(text, truncation=True, max_length=CONTEXT)["input_ids"]
        assert row[: len(given)].tolist() == given
        assert not row[len(given) :].any()
    assert ids[TEXTS.index("word " * 100), -1] == words.end


def test_equal_prompts_and_any_micro_batch_give_equal_scores(clip):
    prompts = ["a red cube", "a cat", "a red cube", "a cat"]
    whole = ClipReward(path=clip).build(CPU).score(images(), asked(prompts))
    pieces = ClipReward(path=clip, micro_batch=1).build(CPU).score(images(), asked(prompts))
    assert torch.allclose(whole, pieces, atol=1e-4)


def test_offloaded_weights_return_to_main_memory_and_score_the_same(clip):
    kept = ClipReward(path=clip).build(CPU)
    offloaded = ClipReward(path=clip, offload=True).build(CPU)
    assert torch.equal(kept.score(images(), asked(PROMPTS)), offloaded.score(images(), asked(PROMPTS)))
    assert next(offloaded.network.parameters()).device == CPU


def test_half_precision_scores_nearly_the_same(clip):
    exact = ClipReward(path=clip).build(CPU).score(images(), asked(PROMPTS))
    rough = ClipReward(path=clip, dtype="bfloat16").build(CPU).score(images(), asked(PROMPTS))
    assert rough.dtype == torch.float32
    assert 0 < (exact - rough).abs().max() < 3


def test_a_device_of_its_own_is_a_lane_of_its_own():
    assert ClipReward().lane == ""
    assert ClipReward(device="cuda:1").lane == "cuda:1"


@pytest.mark.skipif(torch.cuda.device_count() > 7, reason="has the device")
def test_a_device_that_is_not_there_is_an_error(clip):
    with pytest.raises(AegpoError, match=r"reward 'clip': device 'cuda:7' was asked for, but torch sees \d CUDA"):
        ClipReward(path=clip, device="cuda:7").build(CPU)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": "./nowhere"}, "reward 'clip': there is no folder './nowhere'; give 'path' one, or a repository"),
        ({"path": "no-such/repository"}, r"cannot get 'no-such/repository' from the hub: .*'hf download no-such/rep"),
    ],
)
def test_a_network_that_is_not_there_is_an_error(changes, message):
    with pytest.raises(AegpoError, match=message):
        ClipReward(**changes).build(CPU)


def test_a_folder_without_a_network_is_an_error(tmp_path):
    with pytest.raises(AegpoError, match=re.escape(f"path {str(tmp_path)!r} cannot be loaded: OSError")):
        ClipReward(path=str(tmp_path)).build(CPU)


def test_a_network_that_lacks_weights_is_an_error(clip, tmp_path):
    from safetensors.torch import load_file, save_file

    write_clip(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AegpoError, match=r"1 of its weights are missing .*'visual_projection.weight'"):
        ClipReward(path=str(tmp_path)).build(CPU)


def test_a_tokenizer_of_another_network_is_an_error(clip, tmp_path):
    tokenizer = CLIPTokenizer.from_pretrained(write_tokenizer(tmp_path))
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(AegpoError, match=r"the tokenizer has 519 pieces, but the network 518; they must be a pair"):
        PickScoreReward(path=clip, tokenizer=str(tmp_path)).build(CPU)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"layers.0.weight": (1, 24)}, r"the checkpoint does not fit: is missing: 0.bias"),
        ({"layers.0.bias": (1,)}, r"the head's layers \[\] do not lead to one number"),
        ({"layers.0.weight": (8, 24), "layers.2.weight": (1, 7)}, r"\[\(8, 24\), \(1, 7\)\] do not lead to one number"),
        ({"weight": (2, 24), "bias": (2,)}, r"\[\(2, 24\)\] do not lead to one number"),
        ({"weight": (1, 23), "bias": (1,)}, "the head takes 23 features, but .* has 24; pair them"),
        (
            {"fc.weight": (1, 24)},
            "the head has an unknown key 'fc.weight'; 'layers.N.weight' and '.bias' were",
        ),
    ],
)
def test_a_head_that_does_not_fit_is_an_error(tensors, message, clip, tmp_path):
    torch.save({name: torch.zeros(shape) for name, shape in tensors.items()}, tmp_path / "head.pth")
    with pytest.raises(AegpoError, match=message):
        AestheticReward(path=str(tmp_path / "head.pth"), clip=clip).build(CPU)


def test_a_file_that_would_run_code_is_refused(clip, tmp_path):
    torch.save({"weight": np.random.default_rng}, tmp_path / "head.pth")
    with pytest.raises(
        AegpoError, match=r"more than tensors, and reading that would run its code; it should be a safe"
    ):
        AestheticReward(path=str(tmp_path / "head.pth"), clip=clip).build(CPU)


@pytest.mark.parametrize("content", [b"", b"PK nonsense", b"\x00" * 64])
def test_a_file_that_is_no_checkpoint_is_an_error(content, clip, tmp_path):
    (tmp_path / "head.pth").write_bytes(content)
    with pytest.raises(AegpoError, match=r"head.pth' cannot be read as weights"):
        AestheticReward(path=str(tmp_path / "head.pth"), clip=clip).build(CPU)


def test_a_file_without_names_is_an_error(clip, tmp_path):
    torch.save([torch.zeros(1)], tmp_path / "head.pth")
    with pytest.raises(AegpoError, match=r"holds no tensors by name"):
        AestheticReward(path=str(tmp_path / "head.pth"), clip=clip).build(CPU)
