from __future__ import annotations

import base64
import json
import pickle

import pytest
import torch
from safetensors.torch import save

from aegpo.core.records import Prompt
from aegpo.errors import AegpoError
from aegpo.rewards.wire import CONTENT_TYPES, JSON, MOST_BYTES, SAFETENSORS, TooLargeError, pack, png, unpack

IMAGES = torch.rand((3, 3, 5, 7), generator=torch.Generator().manual_seed(0))
VIDEOS = torch.rand((3, 2, 3, 5, 7), generator=torch.Generator().manual_seed(1))
SHOWN, LARGER = (base64.b64encode(png(torch.zeros(3, size, size))).decode() for size in (4, 5))
PROMPTS = [
    Prompt(4, "a red cube", {"count": 3, "boxes": [[0.5, 1.0]], "of": {"what": None}, "\u65e5": True}),
    Prompt(2, 'quotes " and \u65e5\u672c'),
    Prompt(0, ""),
]
OLD = (
    r"the request is of protocol 1 \(aegpo 0.1, whose prompts were strings\), this server takes 3: use the same version"
)
NO_PROMPTS = (
    r"'prompts' is no list of prompts, each \{\"index\": 3, \"text\": \"a cat\", \"metadata\": \{...\}, "
    r"\"images\": \[\]\}"
)


def test_safetensors_keep_every_bit(tmp_path):
    images, prompts = unpack(pack(IMAGES, PROMPTS, "safetensors"), SAFETENSORS, tmp_path)
    assert torch.equal(images, IMAGES)
    assert prompts == PROMPTS


def test_json_keeps_eight_bits(tmp_path):
    images, prompts = unpack(pack(IMAGES, PROMPTS, "json"), JSON, tmp_path)
    assert torch.equal(images, (IMAGES * 255).round() / 255)
    assert prompts == PROMPTS


def test_videos_travel_whole_in_either_body(tmp_path):
    assert torch.equal(unpack(pack(VIDEOS, PROMPTS, "safetensors"), SAFETENSORS, tmp_path)[0], VIDEOS)
    assert torch.equal(unpack(pack(VIDEOS, PROMPTS, "json"), JSON, tmp_path)[0], (VIDEOS * 255).round() / 255)


@pytest.mark.parametrize(
    ("value", "why"), [(IMAGES, "Object of type Tensor is not JSON"), (float("nan"), "Out of range float values")]
)
def test_metadata_that_is_no_json_is_refused_in_words(value, why):
    with pytest.raises(AegpoError, match=f"metadata of a prompt is no JSON: {why}"):
        pack(IMAGES[:1], [Prompt(0, "a", {"mask": value})], "json")


def described(*texts):
    return [{"index": index, "text": text, "metadata": {}, "images": []} for index, text in enumerate(texts)]


def showing(*places):
    return [described("a")[0] | {"images": list(places)}]


def image(**changes):
    shown = [base64.b64encode(png(IMAGES[0])).decode()]
    return json.dumps({"protocol": 3, "prompts": described("a"), "images": shown, **changes}).encode()


def tensors(images, prompts=(), protocol=3):
    return requested(images, json.dumps({"protocol": protocol, "prompts": prompts}))


def requested(images, request):
    return save({"images": images.contiguous()}, metadata={"request": request})


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


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
        (tensors(IMAGES, protocol=2), SAFETENSORS, "the request is of protocol 2, this server takes 3: use the same"),
        (tensors(IMAGES, protocol=4), SAFETENSORS, "the request is of protocol 4, this server takes 3: use the same"),
        (requested(IMAGES, "[]"), SAFETENSORS, OLD),
        (tensors(IMAGES, {}), SAFETENSORS, NO_PROMPTS),
        (tensors(IMAGES, ["a", "b", "c"]), SAFETENSORS, NO_PROMPTS),
        (requested(IMAGES, "nonsense"), SAFETENSORS, "the body is no JSON"),
        (requested(IMAGES, "[" * 100_000), SAFETENSORS, "the body is no JSON that can be taken: it is too deep; 64"),
        (tensors(IMAGES, described("a")), SAFETENSORS, "1 prompts for 3 images; one for each was expected"),
        (
            tensors(IMAGES[:, :1], described("a", "b", "c")),
            SAFETENSORS,
            r"images of shape \(3, 1, 5, 7\); \(N, 3, h, w\) or \(N, F, 3, h, w\) was",
        ),
        (tensors(IMAGES[:0]), SAFETENSORS, r"images of shape \(0, 3, 5, 7\)"),
        (tensors(IMAGES[0]), SAFETENSORS, r"images of shape \(3, 5, 7\)"),
        (tensors(VIDEOS[:, :, :1]), SAFETENSORS, r"images of shape \(3, 2, 1, 5, 7\)"),
        (tensors(VIDEOS[:, :0]), SAFETENSORS, r"images of shape \(3, 0, 3, 5, 7\)"),
        (tensors(VIDEOS[None]), SAFETENSORS, r"images of shape \(1, 3, 2, 3, 5, 7\)"),
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
        (image(images=[["??"]]), JSON, "image 0 is no PNG in base64"),
        (image(images=[[]]), JSON, "image 0 is a list of no frames, or of several sizes; at least one frame"),
        (image(images=[[SHOWN, LARGER]]), JSON, "image 0 is a list of no frames, or of several sizes"),
        (
            image(images=[[SHOWN], [SHOWN] * 2]),
            JSON,
            "or images of several sizes; at least one, and all of one size and",
        ),
        (image(images=[SHOWN, [SHOWN]]), JSON, "no images, or images of several sizes"),
        (image(images=[base64.b64encode(b"GIF89a").decode()]), JSON, "image 0 is no PNG in base64"),
        (image(prompts=[1]), JSON, NO_PROMPTS),
        (image(prompts=[{"index": 0, "text": "a"}]), JSON, NO_PROMPTS),
        (image(prompts=[{"index": 0, "text": "a", "metadata": {}}]), JSON, NO_PROMPTS),
        (image(prompts=[{"index": 0, "text": "a", "metadata": [], "images": []}]), JSON, NO_PROMPTS),
        (image(prompts=[{"index": 0, "text": "a", "metadata": {}, "images": [], "image": 1}]), JSON, NO_PROMPTS),
        (image(prompts=showing(0)), JSON, r"'images' of a prompt is \[0\]; places among the 0 files were expected"),
        (image(prompts=showing(1), files=["AAAA"]), JSON, r"is \[1\]; places among the 1 files were expected"),
        (image(prompts=showing(True), files=["AAAA"]), JSON, r"is \[True\]; places among the 1 files were expected"),
        (image(files=["?"]), JSON, "'files' is no list of files in base64"),
        (image(files="AAAA"), JSON, "'files' is no list of files in base64"),
        (image(files=[1]), JSON, "'files' is no list of files in base64"),
        (save({"images": IMAGES, "file-0": 1 * IMAGES}), SAFETENSORS, "a tensor of a file is torch.float32; uint8 was"),
        (image(prompts=described("a", "b")), JSON, "2 prompts for 1 images"),
        (image(prompts=described("\ud800")), JSON, r"'prompts' has half a character, \\ud800, alone"),
        (image(prompts=described("a")).replace(b": 0,", b": true,"), JSON, NO_PROMPTS),
        (image(files=["AAAA"]), JSON, "file 0 is the image of no prompt; those that prompts name were expected"),
        (image(prompts=showing(0), files=[""]), JSON, "file 0 has 0 bytes; 1 to 16777216 were expected"),
        (image(images=[base64.b64encode(png(IMAGES[0])[:60]).decode()]), JSON, "image 0 is no PNG in base64"),
        (image(metadata=nested(100)), JSON, "no JSON that can be taken: it is too deep; 64 lists and"),
    ],
)
def test_a_wrong_body_is_refused_in_words(body, content_type, message, tmp_path):
    with pytest.raises(AegpoError, match=message):
        unpack(body, content_type, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["safetensors", "json"])
def test_images_of_prompts_arrive_as_files_with_the_same_bytes_each_sent_once(kind, tmp_path):
    contents = [png(IMAGES[0]), b"anything at all", bytes(range(256)) * 100]
    sent = [tmp_path / f"{number}.png" for number in range(3)]
    for path, content in zip(sent, contents, strict=True):
        path.write_bytes(content)
    prompts = [Prompt(0, "a", {}, (sent[2],)), Prompt(1, "b", {}, (sent[0], sent[2], sent[1])), Prompt(2, "c")]
    body = pack(IMAGES, prompts, kind)
    assert len(body) < len(pack(IMAGES, PROMPTS, kind)) + 1.4 * sum(map(len, contents)) + 500
    (tmp_path / "there").mkdir()
    images, received = unpack(body, CONTENT_TYPES[kind], tmp_path / "there")
    assert images.shape == IMAGES.shape
    assert [(each.index, each.text) for each in received] == [(0, "a"), (1, "b"), (2, "c")]
    found = [[path.read_bytes() for path in each.images] for each in received]
    assert found == [[contents[2]], [contents[0], contents[2], contents[1]], []]
    assert received[0].images[0] == received[1].images[1]
    assert len(list((tmp_path / "there").iterdir())) == 3


def test_an_image_of_a_prompt_that_cannot_be_sent_is_told_by_its_path(tmp_path):
    large, empty, gone = (tmp_path / name for name in ("large.png", "empty.png", "gone.png"))
    large.write_bytes(bytes(MOST_BYTES + 1))
    empty.touch()
    for path, why in ((large, "has more bytes; 1 to 16777216 can"), (empty, "has none"), (gone, "cannot be read: No")):
        with pytest.raises(AegpoError, match=f"image '.*{path.name}' of a prompt {why}"):
            pack(IMAGES[:1], [Prompt(0, "a", {}, (path,))], "json")
    large.write_bytes(bytes(MOST_BYTES))
    assert len(pack(IMAGES[:1], [Prompt(0, "a", {}, (large,))], "safetensors")) > MOST_BYTES


def test_what_is_in_a_body_takes_no_more_than_the_body_may(tmp_path):
    wide = base64.b64encode(png(torch.zeros(3, 400, 500))).decode()
    assert len(wide) < 3000
    assert unpack(image(images=[wide]), JSON, tmp_path, most=600_000)[0].shape == (1, 3, 400, 500)
    large = [
        (image(images=[wide]), JSON, "image 0 of 500 x 400 pixels and what came before take more than 599999 bytes"),
        (image(images=[SHOWN] * 600), JSON, "image 585 of 4 x 4 pixels and what came before"),
        (image(files=["AA=="] * 600), JSON, "the files and what came before"),
        (tensors(torch.zeros(600, 3, 1, 1)), SAFETENSORS, "the images and what came before"),
    ]
    for body, content_type, message in large:
        with pytest.raises(TooLargeError, match=message):
            unpack(body, content_type, tmp_path, most=599_999)
    assert not list(tmp_path.iterdir())
    with pytest.raises(AegpoError, match=r"it has .* values and more; 37499 at most"):
        unpack(b'{"images": [' + b"[]," * 40_000 + b"[]]}", JSON, tmp_path, most=599_999)
