"""Where a pipeline is, and what its JSON files say; imports no torch.

Errors name the path, what was found there and what would be right.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from aegpo.errors import AegpoError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
INDEX = "model_index.json"
COMPILERS = ("g++", "clang++", "c++")
KIND_OF_CLASS = {
    "StableDiffusionPipeline": "sd",
    "StableDiffusionXLPipeline": "sdxl",
    "StableDiffusion3Pipeline": "sd3",
    "FluxPipeline": "flux",
}


def local_folder(kind: str, path: str) -> Path | None:
    """The folder a path names, or None where it can only be a hub id.

    Raises:
        AegpoError: if it is neither.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise AegpoError(f"model {kind!r}: 'path' {path!r} is a file; name the folder that save_pretrained wrote")
    if not HUB_ID.fullmatch(path):
        raise AegpoError(
            f"model {kind!r}: there is no folder {path!r}; 'path' takes a folder that save_pretrained wrote, or a hub "
            "id such as org/name"
        )
    return None


def folder_at_hand(path: str, revision: str | None) -> Path | None:
    """The folder of a pipeline that needs no download: a local one, or the hub's snapshot in the cache."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if not HUB_ID.fullmatch(path):
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(path, INDEX, revision=revision)
    return Path(found).parent if isinstance(found, str) else None


def check_class(kind: str, path: str, folder: Path, wanted: str) -> None:
    """The folder holds a pipeline of the wanted class.

    Raises:
        AegpoError: if it holds none, or another one.
    """
    if not (folder / INDEX).is_file():
        found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
        raise AegpoError(
            f"model {kind!r}: {path!r} has no {INDEX} but {found}; a {wanted} as save_pretrained writes it was expected"
        )
    given = str(read_json(kind, folder / INDEX).get("_class_name"))
    if given == wanted:
        return
    other = KIND_OF_CLASS.get(given)
    hint = f"kind {other!r} reads that" if other else f"a {wanted} was expected"
    raise AegpoError(f"model {kind!r}: {path!r} holds a {given}; {hint}")


def check_components(kind: str, path: str, folder: Path, unneeded: tuple[str, ...]) -> None:
    """Every component that model_index.json lists has a folder, but for those nothing reads.

    Raises:
        AegpoError: if one has not.
    """
    listed = {name: entry for name, entry in read_json(kind, folder / INDEX).items() if isinstance(entry, list)}
    wanted = [name for name, entry in listed.items() if entry and entry[0] is not None and name not in unneeded]
    if gone := [name for name in wanted if not (folder / name).is_dir()]:
        raise AegpoError(
            f"model {kind!r}: {path!r} lacks {', '.join(map(repr, gone))}, which its {INDEX} lists; save or download "
            "the whole pipeline again"
        )


def component_config(kind: str, folder: Path, component: str, file: str = "config.json") -> dict[str, Any]:
    """The JSON of one component of a pipeline.

    Raises:
        AegpoError: if the file is missing or is no JSON object.
    """
    return read_json(kind, folder / component / file)


def read_json(kind: str, path: Path) -> dict[str, Any]:
    """A JSON object from a file of a pipeline."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise AegpoError(f"model {kind!r}: {path} is missing; is the pipeline complete?") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise AegpoError(f"model {kind!r}: {path} cannot be read as JSON: {error}") from error
    if not isinstance(data, dict):
        raise AegpoError(f"model {kind!r}: {path} holds a {type(data).__name__}; a JSON object was expected")
    return data


def missing_compiler() -> str | None:
    """What to say where torch.compile finds no C++ compiler; None if there is one."""
    named = os.environ.get("CXX")
    if any(shutil.which(name) for name in ((named,) if named else COMPILERS)):
        return None
    looked = f"CXX names {named!r}, which is not there" if named else f"there is no {', '.join(COMPILERS)}"
    return f"'compile' needs a C++ compiler, and {looked}; install one, or leave 'compile' out"
