from __future__ import annotations

import base64
import json
import pickle

import pytest
import torch
from safetensors.torch import save

from aegpo.core.records import Prompt
from aegpo.errors import AegpoError
from aegpo.rewards.wire import JSON, SAFETENSORS, pack, png, unpack

IMAGES = torch.rand((3, 3, 5, 7), generator=torch.Generator().manual_seed(0))
PROMPTS = [
    Prompt(4, "a red cube", {"count": 3, "boxes": [[0.5, 1.0]], "of": {"what": None}, "\u65e5": True}),
    Prompt(2, 'quotes " and \u65e5\u672c'),
    Prompt(0, ""),
]
OLD = (
    r"the request is of protocol 1 \(aegpo 0.1, whose prompts were strings\), this server takes 2: use the same version"
)
NO_PROMPTS = r"'prompts' is no list of prompts, each \{\"index\": 3, \"text\": \"a cat\", \"metadata\": \{...\}\}"


def test_safetensors_keep_every_bit():
    images, prompts = unpack(pack(IMAGES, PROMPTS, "safetensors"), SAFETENSORS)
    assert torch.equal(images, IMAGES)
    assert prompts == PROMPTS


def test_json_keeps_eight_bits():
    images, prompts = unpack(pack(IMAGES, PROMPTS, "json"), JSON)
    assert torch.equal(images, (IMAGES * 255).round() / 255)
    assert prompts == PROMPTS


@pytest.mark.parametrize(
    ("value", "why"), [(IMAGES, "Object of type Tensor is not JSON"), (float("nan"), "Out of range float values")]
)
def test_metadata_that_is_no_json_is_refused_in_words(value, why):
    with pytest.raises(AegpoError, match=f"metadata of a prompt is no JSON: {why}"):
        pack(IMAGES[:1], [Prompt(0, "a", {"mask": value})], "json")


def described(*texts):
    return [{"index": index, "text": text, "metadata": {}} for index, text in enumerate(texts)]


def image(**changes):
    shown = [base64.b64encode(png(IMAGES[0])).decode()]
    return json.dumps({"protocol": 2, "prompts": described("a"), "images": shown, **changes}).encode()


def tensors(images, prompts=(), protocol=2):
    return requested(images, json.dumps({"protocol": protocol, "prompts": prompts}))


def requested(images, request):
    return save({"images": images.contiguous()}, metadata={"request": request})


def of_edition_one(images, texts, body):
    """A body as aegpo 0.1 packed it."""
    if body == "json":
        shown = [base64.b64encode(png(each)).decode() for each in images]
        return json.dumps({"prompts": texts, "images": shown}).encode()
    return save({"images": images}, metadata={"prompts": json.dumps(texts)})


@pytest.mark.parametrize(
    ("body", "content_type", "message"),
    [
        (
            pickle.dumps([1]),
            "application/x-pickle",
            "content type 'application/x-pickle'; 'application/octet-stream'",
        ),
        (pickle.dumps([1]), SAFETENSORS, "the body is no safetensors file"),
        (b"", SAFETENSORS, "the body is no safetensors file"),
        (save({"pixels": IMAGES}), SAFETENSORS, "tensor 'images' is none; float32 was expected"),
        (tensors(IMAGES.half()), SAFETENSORS, r"tensor 'images' is torch.float16; float32 was expected"),
        (of_edition_one(IMAGES, ["a", "b", "c"], "safetensors"), SAFETENSORS, OLD),
        (of_edition_one(IMAGES, ["a", "b", "c"], "json"), JSON, OLD),
        (tensors(IMAGES, protocol=3), SAFETENSORS, "the request is of protocol 3, this server takes 2: use the same"),
        (requested(IMAGES, "[]"), SAFETENSORS, OLD),
        (tensors(IMAGES, {}), SAFETENSORS, NO_PROMPTS),
        (tensors(IMAGES, ["a", "b", "c"]), SAFETENSORS, NO_PROMPTS),
        (requested(IMAGES, "nonsense"), SAFETENSORS, "the body is no JSON"),
        (requested(IMAGES, "[" * 100_000), SAFETENSORS, "the body is no JSON: maximum recursion depth exceeded"),
        (tensors(IMAGES, described("a")), SAFETENSORS, "1 prompts for 3 images; one for each was expected"),
        (
            tensors(IMAGES[:, :1], described("a", "b", "c")),
            SAFETENSORS,
            r"images of shape \(3, 1, 5, 7\); \(N, 3, h, w\) was",
        ),
        (tensors(IMAGES[:0]), SAFETENSORS, r"images of shape \(0, 3, 5, 7\)"),
        (tensors(IMAGES[0]), SAFETENSORS, r"images of shape \(3, 5, 7\)"),
        (
            tensors(IMAGES[:1] * 2, described("a")),
            SAFETENSORS,
            r"pixels from .* to 1.9\d*; \[0, 1\] was expected",
        ),
        (tensors(IMAGES[:1] * float("nan"), described("a")), SAFETENSORS, "pixels from nan to nan"),
        (b"{", JSON, "the body is no JSON"),
        (b"[]", JSON, "the body has no list 'images'"),
        (image(images=[]), JSON, "no images, or images of several sizes"),
        (image(images=["??"]), JSON, "image 0 is no PNG in base64"),
        (image(images=[base64.b64encode(b"GIF89a").decode()]), JSON, "image 0 is no PNG in base64"),
        (image(prompts=[1]), JSON, NO_PROMPTS),
        (image(prompts=[{"index": 0, "text": "a"}]), JSON, NO_PROMPTS),
        (image(prompts=[{"index": 0, "text": "a", "metadata": []}]), JSON, NO_PROMPTS),
        (image(prompts=[{"index": 0, "text": "a", "metadata": {}, "image": 1}]), JSON, NO_PROMPTS),
        (image(prompts=described("a", "b")), JSON, "2 prompts for 1 images"),
    ],
)
def test_a_wrong_body_is_refused_in_words(body, content_type, message):
    with pytest.raises(AegpoError, match=message):
        unpack(body, content_type)
