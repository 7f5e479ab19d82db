"""What a run is made with: versions of libraries, and the source code of the package."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

LIBRARIES = (
    "accelerate",
    "aegpo",
    "bitsandbytes",
    "diffusers",
    "huggingface_hub",
    "numpy",
    "peft",
    "pillow",
    "pluggy",
    "pydantic",
    "safetensors",
    "torch",
    "transformers",
)
_PACKAGE = Path(__file__).parents[1]


def versions() -> dict[str, str | None]:
    """Version of Python and of every library that can change a number; None where one is not installed."""
    return {"python": platform.python_version(), **{name: _version(name) for name in LIBRARIES}}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def source_state(folder: Path = _PACKAGE) -> dict[str, Any]:
    """Which source code runs: git's `commit` of it, and whether it is `dirty`, changed since.

    Both are None where the code is in no repository, as in an installed wheel; also if the folder it was installed
    into happens to lie in one.
    """
    tracked = _git(folder, "ls-files", "--error-unmatch", "__init__.py")
    commit = None if tracked is None else _git(folder, "rev-parse", "HEAD")
    changed = None if commit is None else _git(folder, "status", "--porcelain", "--", ".")
    return {"commit": commit, "dirty": None if changed is None else changed != ""}


def _git(folder: Path, *words: str) -> str | None:
    """What git prints, or None if it fails or is not there."""
    try:
        answer = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None
