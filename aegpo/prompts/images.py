"""Images that prompts name: read beside their texts, looked for when a list is read, told apart by what is in them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aegpo.core.records import Prompt
from aegpo.errors import SettingError

ONE, SEVERAL = KEYS = ("image", "images")  # a path, or a list of paths


def named_images(where: str, beside: Mapping[str, Any], folder: Path) -> tuple[Path, ...]:
    """The paths under the keys `image` and `images`, from the folder of the prompts; nulls count as absent.

    Args:
        where: the place of the prompt, for errors.
        beside: what its line has beside the text.
        folder: what relative paths are relative to.

    Raises:
        SettingError: if there are no paths under a key, or both keys.
    """
    given = {key: beside[key] for key in KEYS if beside.get(key) is not None}
    if len(given) > 1:
        raise SettingError(
            f"{where} has both {ONE!r} and {SEVERAL!r}; name all its images under {SEVERAL!r}", "prompts"
        )
    for key, value in given.items():
        names = [value] if key == ONE else value
        if isinstance(names, list) and all(isinstance(name, str) for name in names):
            try:
                return tuple((folder / name).resolve() for name in names)
            except (OSError, RuntimeError, ValueError) as error:  # a name that no file can have, or a circle of links
                what = f"{json.dumps(names):.60} cannot be the path of an image: {error}"
                raise SettingError(f"{where}: {what}", "prompts") from error
        wanted = "a path" if key == ONE else "a list of paths"
        raise SettingError(f"{where}: {key!r} is {json.dumps(value):.60}; {wanted} was expected", "prompts")
    return ()


def refuse_others(where: str, images: tuple[Path, ...]) -> None:
    """Every image of a prompt is the file of an image, and not of more pixels than Pillow opens.

    Models and servers of rewards are given its bytes: a list of prompts must not make them out of any other file.

    Raises:
        SettingError: if one is not; the message names the first.
    """
    from PIL import Image

    for path in images:
        if not os.path.isfile(path):  # noqa: PTH113  (Path.is_file fails where a name is too long)
            raise SettingError(
                f"{where}: no image {path.name!r} in {str(path.parent)!r}; paths go from the folder of the prompts",
                "prompts",
            )
        try:
            with Image.open(path):
                pass
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            wrong = "is no image" if not isinstance(error, Image.DecompressionBombError) else f"is too large: {error}"
            raise SettingError(f"{where}: {path.name!r} in {str(path.parent)!r} {wrong}", "prompts") from error


def identity(prompt: Prompt) -> str | dict[str, Any]:
    """What a prompt asks of a model that reads images, as JSON for the keys of caches: the text, and SHA-256 of images.

    Where there are none it is the text alone.
    """
    if not prompt.images:
        return prompt.text
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in prompt.images]
    return {"text": prompt.text, "images": digests}
