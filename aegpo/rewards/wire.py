"""Images and prompts on the wire: safetensors (every bit of float32) or JSON (PNG, 8 bits); nothing is ever pickled.

A body is a batch: N images of one size and N prompts, each ``{"index": 3, "text": "a cat", "metadata": {...}}``. The
answer to either is JSON, ``{"scores": [N numbers]}``.

    application/octet-stream   a safetensors file with one tensor `images`, (N, 3, h, w) float32 in [0, 1], and
                               metadata `request`, the JSON ``{"protocol": 2, "prompts": [N prompts]}``
    application/json           ``{"protocol": 2, "prompts": [N prompts], "images": [N strings]}``, each image a PNG in
                               base64

GET /health says which protocol a server takes. Protocol 1, of aegpo 0.1, had strings for prompts, in metadata
`prompts`, and no key `protocol`.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from aegpo.core.records import Prompt
from aegpo.errors import AegpoError

if TYPE_CHECKING:
    from torch import Tensor

PROTOCOL = 2
STRINGS_WANTED = "'prompts' is no list of strings"  # what a server of protocol 1 says to a body of this one
SAFETENSORS = "application/octet-stream"
JSON = "application/json"
CONTENT_TYPES = {"safetensors": SAFETENSORS, "json": JSON}


def pack(images: Tensor, prompts: Sequence[Prompt], body: str) -> bytes:
    """(N, 3, h, w) in [0, 1] and N prompts as a body of kind `safetensors` or `json`.

    Raises:
        AegpoError: if the metadata of a prompt is no JSON.
    """
    listed = [{"index": each.index, "text": each.text, "metadata": dict(each.metadata)} for each in prompts]
    request: dict[str, Any] = {"protocol": PROTOCOL, "prompts": listed}
    try:
        written = json.dumps(request, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise AegpoError(f"metadata of a prompt is no JSON: {error}; texts, numbers, lists and mappings are") from error
    if body == "json":
        shown = [base64.b64encode(png(image)).decode() for image in images]
        return json.dumps(request | {"images": shown}).encode()
    from safetensors.torch import save

    packed: bytes = save({"images": images.float().cpu().contiguous()}, metadata={"request": written})
    return packed


def unpack(body: bytes, content_type: str) -> tuple[Tensor, list[Prompt]]:
    """What `pack` was given.

    Raises:
        AegpoError: if the body is not one, in words for who sent it.
    """
    if content_type == JSON:
        images, prompts = _from_json(body)
    elif content_type == SAFETENSORS:
        images, prompts = _from_safetensors(body)
    else:
        raise AegpoError(f"content type {content_type!r}; {SAFETENSORS!r} or {JSON!r} was expected")
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape:
        raise AegpoError(f"images of shape {tuple(images.shape)}; (N, 3, h, w) was expected")
    if len(prompts) != len(images):
        raise AegpoError(f"{len(prompts)} prompts for {len(images)} images; one for each was expected")
    if not bool((images.ge(0) & images.le(1)).all()):  # not for NaN either
        raise AegpoError(f"pixels from {float(images.min()):g} to {float(images.max()):g}; [0, 1] was expected")
    return images, prompts


def png(image: Tensor) -> bytes:
    """(3, h, w) in [0, 1] as a PNG file, rounded to 8 bits."""
    import torch
    from PIL import Image

    pixels = (image.detach() * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def _from_safetensors(body: bytes) -> tuple[Tensor, list[Prompt]]:
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        images = load(body).get("images")
    except SafetensorError as error:
        raise AegpoError(f"the body is no safetensors file: {error}") from error
    if images is None or images.dtype != torch.float32:
        given = "none" if images is None else str(images.dtype)
        raise AegpoError(f"tensor 'images' is {given}; float32 was expected")
    return images, _prompts(_read_json(_metadata(body).get("request", "{}")))


def _metadata(body: bytes) -> dict[str, str]:
    """The header's free text; `safetensors.torch.load`, which has checked the header, does not give it."""
    header: dict[str, Any] = json.loads(body[8 : 8 + int.from_bytes(body[:8], "little")])
    metadata: dict[str, str] = header.get("__metadata__", {})
    return metadata


def _from_json(body: bytes) -> tuple[Tensor, list[Prompt]]:
    import torch

    content = _read_json(body)
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        raise AegpoError('the body has no list \'images\'; {"prompts": [...], "images": [...]} was expected')
    prompts = _prompts(content)
    images = [_from_png(index, shown) for index, shown in enumerate(content["images"])]
    if len({image.shape for image in images}) != 1:
        raise AegpoError("no images, or images of several sizes; at least one, and all of one size, were expected")
    return torch.stack(images), prompts


def _from_png(index: int, shown: object) -> Tensor:  # (3, h, w)
    import numpy as np
    import torch
    from PIL import Image

    try:
        picture = Image.open(io.BytesIO(base64.b64decode(str(shown), validate=True)), formats=["PNG"])
        pixels = np.asarray(picture.convert("RGB"))
    except (binascii.Error, OSError, ValueError, Image.DecompressionBombError) as error:
        raise AegpoError(f"image {index} is no PNG in base64: {error}") from error
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float().div(255)


def _read_json(text: bytes | str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise AegpoError(f"the body is no JSON: {error}") from error


def _prompts(request: object) -> list[Prompt]:
    content = request if isinstance(request, dict) else {}
    protocol, listed = content.get("protocol", 1), content.get("prompts")
    if protocol != PROTOCOL:
        age = " (aegpo 0.1, whose prompts were strings)" if protocol == 1 else ""
        raise AegpoError(
            f"the request is of protocol {protocol!r:.20}{age}, this server takes {PROTOCOL}: use the same version of "
            "aegpo for both"
        )
    if not isinstance(listed, list):
        raise AegpoError(_NO_PROMPTS)
    return [_prompt(each) for each in listed]


_NO_PROMPTS = '\'prompts\' is no list of prompts, each {"index": 3, "text": "a cat", "metadata": {...}}'


def _prompt(given: object) -> Prompt:
    match given:
        case {"index": int(index), "text": str(text), "metadata": dict(metadata), **rest} if not rest:
            return Prompt(index, text, metadata)
    raise AegpoError(_NO_PROMPTS)
