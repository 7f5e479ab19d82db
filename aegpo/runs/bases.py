"""Which base a run is trained from: the weights of its model before training, told apart by what is in them.

    {"hub": "org/name", "commit": "9f2a..."}     a snapshot of the hub in its cache
    {"sha256": "51c0..."}                        any other folder: of the names and contents of its files

So a folder may be moved or copied, but what is in it may not change. Checksums of large files are kept in the user's
cache by path, size and time of change, so that tens of gigabytes are read once and not at each start.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from aegpo.core.experiment import Experiment
from aegpo.core.parts import ModelSpec
from aegpo.core.places import cache_folder
from aegpo.errors import AegpoError, CheckpointError
from aegpo.runs.records import read_document, write_document

Base = Mapping[str, Any]  # as JSON

LARGE = 2**24  # bytes; what is smaller is read as fast as its checksum is looked up
_DOCUMENTS = (".md", ".jsonl", ".png", ".jpg", ".jpeg", ".gif", ".webp")  # that tell people of the weights
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SETTLED = 2.0  # seconds; a file that was changed later may change again without another time
_CHECKSUMS = "checksums.json"  # in the cache


def base_of(model: ModelSpec) -> Base | None:
    """The base of a model; None: its weights are in no folder, or are not downloaded yet.

    Raises:
        AegpoError: if a file of it cannot be read.
    """
    folder = model.base_folder
    if folder is None or not folder.is_dir():
        return None
    repository = folder.parent.parent.name
    if folder.parent.name == "snapshots" and repository.startswith("models--") and _COMMIT.fullmatch(folder.name):
        return {"hub": repository.removeprefix("models--").replace("--", "/", 1), "commit": folder.name}
    try:
        return {"sha256": _folder_sha256(folder)}
    except OSError as error:
        raise AegpoError(
            f"model {model.kind!r}: {error.filename} cannot be read: {error.strerror}, so nobody knows whether it is "
            "the base of a run; have it made readable, or move it out of the folder"
        ) from error


def told(base: Base) -> str:
    """How messages call a base."""
    if "hub" in base:
        return f"{base['hub']} at commit {str(base.get('commit'))[:12]}"
    return f"files with SHA-256 {str(base.get('sha256'))[:12]}"


def pinned(experiment: Experiment, base: Base | None) -> Experiment:
    """The experiment with its model at the hub's commit that a run was trained from; a branch may have moved on."""
    model = experiment.model
    if base is None or "commit" not in base or "revision" not in type(model).model_fields:
        return experiment
    return experiment.model_copy(update={"model": model.model_copy(update={"revision": base["commit"]})})


def check_base(folder: Path, noted: Base | None, model: ModelSpec) -> None:
    """Refuses to open a run with another base than it was trained from.

    Args:
        folder: of the run.
        noted: what its manifest says; None: nothing, it was begun by version 0.1.0.
        model: of its experiment.

    Raises:
        CheckpointError: if its base is another one now.
    """
    if noted is None and model.ships_base:
        raise CheckpointError(
            f"{folder} was begun by aegpo 0.1.0 from the weights that came with it; model {model.kind!r} of this "
            "version has others, its text encoder too, so only the report of the run can be written anew. Use aegpo "
            "0.1.0 for the rest, or start the run over with --fresh"
        )
    found = None if noted is None else base_of(model)
    if noted is not None and found is not None and found != noted:
        raise CheckpointError(
            f"{folder} was trained from {told(noted)}, but {model.base_folder} has {told(found)}: the weights of model "
            f"{model.kind!r} were changed since; put those back that it was trained from, or start the run over with "
            "--fresh"
        )


# --- checksums of folders --------------------------------------------------------------------------------------------


def _folder_sha256(folder: Path) -> str:
    """SHA-256 of the names and contents of a folder's files, but for hidden ones and documents.

    Raises:
        OSError: if one cannot be read.
    """
    checksums = _Checksums()
    total = hashlib.sha256()
    for path in sorted(_files(folder)):
        total.update(f"{checksums.of(path)} {path.relative_to(folder).as_posix()}\n".encode())
    checksums.keep()
    return total.hexdigest()


def _files(folder: Path) -> Iterator[Path]:
    """The files below a folder, behind links too, of which none is entered twice."""
    entered = set[str]()
    for root, folders, files in os.walk(folder, followlinks=True, onerror=_fail):
        entered.add(os.path.realpath(root))
        folders[:] = [
            name for name in folders if not name.startswith(".") and os.path.realpath(Path(root) / name) not in entered
        ]
        for name in files:
            if not name.startswith(".") and Path(name).suffix.lower() not in _DOCUMENTS:
                yield Path(root) / name


def _fail(error: OSError) -> None:
    raise error


class _Checksums:
    """SHA-256 of files; those of large ones are kept in the user's cache."""

    def __init__(self) -> None:
        self._path = _cache_file()
        self._known = _read_cache(self._path)
        self._new: dict[str, list[Any]] = {}

    def of(self, path: Path) -> str:
        """SHA-256 of a file's content."""
        state = path.stat()
        seen = [state.st_size, state.st_mtime_ns]
        name = str(path.resolve())
        known = self._known.get(name)
        if isinstance(known, list) and known[:2] == seen:
            return str(known[2])
        with path.open("rb") as file:
            checksum = hashlib.file_digest(file, "sha256").hexdigest()
        if state.st_size >= LARGE and time.time() - state.st_mtime > _SETTLED:
            self._new[name] = [*seen, checksum]
        return checksum

    def keep(self) -> None:
        """Adds what was read to the cache; where that cannot be written it is read again at the next start."""
        if not self._new or self._path is None:
            return
        files = {name: each for name, each in {**_read_cache(self._path), **self._new}.items() if Path(name).exists()}
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_document(self._path, {"files": files})


def _cache_file() -> Path | None:
    try:
        return cache_folder(None) / _CHECKSUMS
    except RuntimeError:  # there is no home
        return None


def _read_cache(path: Path | None) -> Mapping[str, Any]:
    """What is kept; nothing where the file is missing or damaged, for all of it can be made again."""
    if path is None:
        return {}
    try:
        files = read_document(path, ("files",), "delete it").get("files")
    except CheckpointError:
        return {}
    return files if isinstance(files, dict) else {}
