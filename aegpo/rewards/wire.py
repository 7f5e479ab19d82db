"""Images and prompts on the wire: safetensors (every bit of float32) or JSON (PNG, 8 bits); nothing is ever pickled.

A body is a batch: N images or videos of one size and N prompts, each ``{"index": 3, "text": "a cat", "metadata": {...},
"images": [0]}``. The answer to either is JSON, ``{"scores": [N numbers]}``.

    application/octet-stream   a safetensors file with one tensor `images`, (N, 3, h, w) or of videos
                               (N, frames, 3, h, w), float32 in [0, 1], and metadata `request`, the JSON
                               ``{"protocol": 3, "prompts": [N prompts]}``
    application/json           ``{"protocol": 3, "prompts": [N prompts], "images": [N strings], "files": [F strings]}``,
                               each image a PNG in base64, each video a list of them

The images that prompts name are files, which a server cannot open: their bytes are sent, each file once, and prompts
have their places among the files. In safetensors they are tensors `file-0`, `file-1`, ... of uint8, in JSON they are
base64. A file has 16 MiB at most, and is named by a prompt.

A body comes from a stranger: what it becomes in memory counts against the same limit as its own bytes (`Room`), before
it is there.

GET /health says which protocol a server takes. Protocol 1, of aegpo 0.1, had strings for prompts, in metadata
`prompts`, and no key `protocol`; protocol 2 had prompts without images, and no videos.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aegpo.core import bounded_json
from aegpo.core.records import Prompt
from aegpo.errors import AegpoError

if TYPE_CHECKING:
    from torch import Tensor

PROTOCOL = 3
MOST_BYTES = 16 * 2**20  # of a file that a prompt names
MOST_OF_REQUESTS = 256 * 2**20  # bytes
STRINGS_WANTED = "'prompts' is no list of strings"  # what a server of protocol 1 says to a body of this one
SAFETENSORS = "application/octet-stream"
JSON = "application/json"
CONTENT_TYPES = {"safetensors": SAFETENSORS, "json": JSON}
_FILE = "file-"  # begins the names of tensors with the bytes of files
_LEAST = 1024  # bytes that anything takes, however small
_Unpacked = tuple["Tensor", Any, list[bytes]]  # (N, [F,] 3, h, w), the request, and the files


class TooLargeError(AegpoError):
    """A body that would take more memory than it may."""


class Room:
    """The bytes that what is in a request may still take, once it is out of it."""

    def __init__(self, bytes_: int) -> None:
        self.all = self._left = bytes_

    def take(self, bytes_: int, what: str) -> None:
        """Makes place for so many bytes.

        Raises:
            TooLargeError: if there is none, with what it was for.
        """
        self._left -= max(bytes_, _LEAST)
        if self._left < 0:
            raise TooLargeError(f"{what} and what came before take more than {self.all} bytes; send fewer images")


def pack(images: Tensor, prompts: Sequence[Prompt], body: str) -> bytes:
    """(N, [F,] 3, h, w) in [0, 1] and N prompts as a body of kind `safetensors` or `json`.

    Raises:
        AegpoError: if the metadata of a prompt is no JSON, or an image of one cannot be sent.
    """
    paths = list(dict.fromkeys(path for each in prompts for path in each.images))
    files = [_content(path) for path in paths]
    listed = [
        {"index": each.index, "text": each.text, "metadata": dict(each.metadata)}
        | {"images": [paths.index(path) for path in each.images]}
        for each in prompts
    ]
    request: dict[str, Any] = {"protocol": PROTOCOL, "prompts": listed}
    try:
        written = json.dumps(request, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise AegpoError(f"metadata of a prompt is no JSON: {error}; texts, numbers, lists and mappings are") from error
    if body == "json":
        shown = [_shown(image) for image in images]
        sent = [base64.b64encode(each).decode() for each in files]
        return json.dumps(request | {"images": shown, "files": sent}).encode()
    import torch
    from safetensors.torch import save

    tensors = {"images": images.float().cpu().contiguous()}
    for place, content in enumerate(files):
        tensors[f"{_FILE}{place}"] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    packed: bytes = save(tensors, metadata={"request": written})
    return packed


def _content(path: Path) -> bytes:
    """The bytes of a prompt's image; not more than a request takes."""
    try:
        with path.open("rb") as stream:
            content = stream.read(MOST_BYTES + 1)
    except OSError as error:
        raise AegpoError(f"image {str(path)!r} of a prompt cannot be read: {error.strerror}") from error
    if not 0 < len(content) <= MOST_BYTES:
        given = "more bytes" if content else "none"
        raise AegpoError(f"image {str(path)!r} of a prompt has {given}; 1 to {MOST_BYTES} can be sent to a server")
    return content


def unpack(body: bytes, content_type: str, folder: Path, most: int = MOST_OF_REQUESTS) -> tuple[Tensor, list[Prompt]]:
    """What `pack` was given; images of prompts are files in `folder` now.

    Raises:
        TooLargeError: if what is in it takes more than `most` bytes.
        AegpoError: if the body is not one, in words for who sent it.
    """
    room = Room(most)
    if content_type == JSON:
        images, request, files = _from_json(body, room)
    elif content_type == SAFETENSORS:
        images, request, files = _from_safetensors(body, room)
    else:
        raise AegpoError(f"content type {content_type!r:.80}; {SAFETENSORS!r} or {JSON!r} was expected")
    paths = [folder / f"{place:05d}" for place in range(len(files))]
    prompts = _prompts(request, paths)
    if images.ndim not in (4, 5) or images.shape[-3] != 3 or 0 in images.shape:
        raise AegpoError(f"images of shape {tuple(images.shape)}; (N, 3, h, w) or (N, F, 3, h, w) was expected")
    if len(prompts) != len(images):
        raise AegpoError(f"{len(prompts)} prompts for {len(images)} images; one for each was expected")
    if not bool((images.ge(0) & images.le(1)).all()):  # not for NaN either
        raise AegpoError(f"pixels from {float(images.min()):g} to {float(images.max()):g}; [0, 1] was expected")
    _check_files(files, paths, prompts)
    for path, content in zip(paths, files, strict=True):
        path.write_bytes(content)
    return images, prompts


def _check_files(files: Sequence[bytes], paths: Sequence[Path], prompts: Sequence[Prompt]) -> None:
    named = {path for prompt in prompts for path in prompt.images}
    for path, content in zip(paths, files, strict=True):
        if path not in named:
            raise AegpoError(f"file {int(path.name)} is the image of no prompt; those that prompts name were expected")
        if not 0 < len(content) <= MOST_BYTES:
            raise AegpoError(f"file {int(path.name)} has {len(content)} bytes; 1 to {MOST_BYTES} were expected")


def png(image: Tensor) -> bytes:
    """(3, h, w) in [0, 1] as a PNG file, rounded to 8 bits."""
    import torch
    from PIL import Image

    pixels = (image.detach() * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def _shown(image: Tensor) -> str | list[str]:  # ([F,] 3, h, w)
    """A PNG in base64, or one a frame."""
    if image.ndim == 4:
        return [base64.b64encode(png(frame)).decode() for frame in image]
    return base64.b64encode(png(image)).decode()


def _from_safetensors(body: bytes, room: Room) -> _Unpacked:
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(body)
    except SafetensorError as error:
        raise AegpoError(f"the body is no safetensors file: {error!s:.200}") from error
    images = tensors.get("images")
    if images is None or images.dtype != torch.float32:
        given = "none" if images is None else str(images.dtype)
        raise AegpoError(f"tensor 'images' is {given}; float32 was expected")
    rows = len(images) if images.ndim else 0
    for _ in range(rows):
        room.take(images.nbytes // rows, "the images")
    sent = [tensors[name] for name in (f"{_FILE}{place}" for place in range(len(tensors))) if name in tensors]
    wrong = next((str(each.dtype) for each in sent if each.dtype != torch.uint8), None)
    if wrong is not None:
        raise AegpoError(f"a tensor of a file is {wrong}; uint8 was expected")
    for each in sent:
        room.take(each.nbytes, "the files")
    files = [each.numpy().tobytes() for each in sent]
    return images, _read_json(_metadata(body).get("request", "{}"), room), files


def _metadata(body: bytes) -> dict[str, str]:
    """The header's free text; `safetensors.torch.load`, which has checked the header, does not give it."""
    header: dict[str, Any] = json.loads(body[8 : 8 + int.from_bytes(body[:8], "little")])
    metadata: dict[str, str] = header.get("__metadata__") or {}
    return metadata


def _from_json(body: bytes, room: Room) -> _Unpacked:
    import torch

    content = _read_json(body, room)
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        raise AegpoError('the body has no list \'images\'; {"prompts": [...], "images": [...]} was expected')
    _check_protocol(content)
    images = [_image(index, shown, room) for index, shown in enumerate(content["images"])]
    if len({image.shape for image in images}) != 1:
        raise AegpoError(
            "no images, or images of several sizes; at least one, and all of one size and length, were expected"
        )
    sent = content.get("files", [])
    try:
        files = [_file(each, room) for each in sent] if isinstance(sent, list) else None
    except (binascii.Error, TypeError, ValueError):
        files = None
    if files is None:
        raise AegpoError("'files' is no list of files in base64")
    return torch.stack(images).float().div(255), content, files


def _file(shown: str, room: Room) -> bytes:
    content = base64.b64decode(shown, validate=True)
    room.take(len(content), "the files")
    return content


def _image(index: int, shown: object, room: Room) -> Tensor:  # ([F,] 3, h, w) uint8
    import torch

    if not isinstance(shown, list):
        return _from_png(index, shown, room)
    frames = [_from_png(index, each, room) for each in shown]
    if len({frame.shape for frame in frames}) != 1:
        raise AegpoError(
            f"image {index} is a list of no frames, or of several sizes; at least one frame, and all of one size, were "
            "expected"
        )
    return torch.stack(frames)


# What Pillow raises of damaged files, which is more than it says; a size that no memory has is asked for before.
_NO_PNG: tuple[type[Exception], ...] = (binascii.Error, struct.error, zlib.error, EOFError, IndexError, KeyError)
_NO_PNG += (OSError, OverflowError, SyntaxError, TypeError, ValueError)


def _from_png(index: int, shown: object, room: Room) -> Tensor:  # (3, h, w) uint8
    import numpy as np
    import torch
    from PIL import Image

    try:
        picture = Image.open(io.BytesIO(base64.b64decode(str(shown), validate=True)), formats=["PNG"])
        width, height = picture.size  # of the header; nothing is unpacked yet
        room.take(3 * width * height, f"image {index} of {width} x {height} pixels")
        pixels = np.asarray(picture.convert("RGB"))
    except Image.DecompressionBombError as error:
        raise TooLargeError(f"image {index} has too many pixels: {error!s:.200}") from error
    except _NO_PNG as error:
        raise AegpoError(f"image {index} is no PNG in base64: {error!s:.200}") from error
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)


def _read_json(text: bytes | str, room: Room) -> Any:
    try:
        return bounded_json.loads(text, bounded_json.most_values(room.all))
    except ValueError as error:
        raise AegpoError(f"the body is no JSON that can be taken: {error!s:.200}") from error


def _check_protocol(request: object) -> None:
    protocol = request.get("protocol", 1) if isinstance(request, dict) else 1
    if protocol != PROTOCOL:
        age = " (aegpo 0.1, whose prompts were strings)" if protocol == 1 else ""
        raise AegpoError(
            f"the request is of protocol {protocol!r:.20}{age}, this server takes {PROTOCOL}: use the same version of "
            "aegpo for both"
        )


def _prompts(request: Any, files: Sequence[Path]) -> list[Prompt]:
    _check_protocol(request)
    listed = request.get("prompts")
    if not isinstance(listed, list):
        raise AegpoError(_NO_PROMPTS)
    try:
        json.dumps(listed, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise AegpoError(f"'prompts' has half a character, \\u{ord(error.object[error.start]):04x}, alone") from error
    return [_prompt(each, files) for each in listed]


_NO_PROMPTS = '\'prompts\' is no list of prompts, each {"index": 3, "text": "a cat", "metadata": {...}, "images": []}'


def _prompt(given: object, files: Sequence[Path]) -> Prompt:
    match given:
        case {"index": int(index), "text": str(text), "metadata": dict(metadata), "images": list(places), **rest}:
            known = all(type(place) is int and 0 <= place < len(files) for place in places)
            if known and not rest and type(index) is int:
                return Prompt(index, text, metadata, tuple(files[place] for place in places))
            if not known:
                raise AegpoError(
                    f"'images' of a prompt is {places!r:.60}; places among the {len(files)} files were expected"
                )
    raise AegpoError(_NO_PROMPTS)
