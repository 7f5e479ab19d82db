from __future__ import annotations

import base64
import json
import pickle

import pytest
import torch
from safetensors.torch import save

from aegpo.errors import AegpoError
from aegpo.rewards.wire import JSON, SAFETENSORS, pack, png, unpack

IMAGES = torch.rand((3, 3, 5, 7), generator=torch.Generator().manual_seed(0))
PROMPTS = ["a red cube", 'quotes " and \u65e5\u672c', ""]


def test_safetensors_keep_every_bit():
    images, prompts = unpack(pack(IMAGES, PROMPTS, "safetensors"), SAFETENSORS)
    assert torch.equal(images, IMAGES)
    assert prompts == PROMPTS


def test_json_keeps_eight_bits():
    images, prompts = unpack(pack(IMAGES, PROMPTS, "json"), JSON)
    assert torch.equal(images, (IMAGES * 255).round() / 255)
    assert prompts == PROMPTS


def image(**changes):
    return json.dumps({"prompts": ["a"], "images": [base64.b64encode(png(IMAGES[0])).decode()], **changes}).encode()


def tensors(images, prompts="[]"):
    return save({"images": images.contiguous()}, metadata={"prompts": prompts})


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
        (save({"images": IMAGES}), SAFETENSORS, "'prompts' is no list of strings"),
        (tensors(IMAGES, "nonsense"), SAFETENSORS, "'prompts' is no list of strings"),
        (tensors(IMAGES, '["a"]'), SAFETENSORS, "1 prompts for 3 images; one for each was expected"),
        (tensors(IMAGES[:, :1], '["a", "b", "c"]'), SAFETENSORS, r"images of shape \(3, 1, 5, 7\); \(N, 3, h, w\) was"),
        (tensors(IMAGES[:0]), SAFETENSORS, r"images of shape \(0, 3, 5, 7\)"),
        (tensors(IMAGES[0]), SAFETENSORS, r"images of shape \(3, 5, 7\)"),
        (tensors(IMAGES[:1] * 2, '["a"]'), SAFETENSORS, r"pixels from .* to 1.9\d*; \[0, 1\] was expected"),
        (tensors(IMAGES[:1] * float("nan"), '["a"]'), SAFETENSORS, "pixels from nan to nan"),
        (b"{", JSON, "the body is no JSON"),
        (b"[]", JSON, "the body has no list 'images'"),
        (image(images=[]), JSON, "no images, or images of several sizes"),
        (image(images=["??"]), JSON, "image 0 is no PNG in base64"),
        (image(images=[base64.b64encode(b"GIF89a").decode()]), JSON, "image 0 is no PNG in base64"),
        (image(prompts=[1]), JSON, "'prompts' is no list of strings"),
        (image(prompts=["a", "b"]), JSON, "2 prompts for 1 images"),
    ],
)
def test_a_wrong_body_is_refused_in_words(body, content_type, message):
    with pytest.raises(AegpoError, match=message):
        unpack(body, content_type)
