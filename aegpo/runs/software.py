"""What a run is made with: versions of libraries, and the source code of the package."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

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


def source_sha256(part: type) -> str | None:
    """SHA-256 of the Python files of the package that a class comes from, or of its one file; None: there is none."""
    module = sys.modules.get(part.__module__.partition(".")[0])
    spec = None if module is None else module.__spec__
    if spec is None or spec.origin is None:
        return None
    folders = [Path(each) for each in spec.submodule_search_locations or ()]
    files = sorted(path for folder in folders for path in folder.rglob("*.py")) if folders else [Path(spec.origin)]
    digest = hashlib.sha256()
    for path in files:
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def computing_on(device: torch.device) -> dict[str, Any]:
    """What decides last bits beside versions: the processor, or the GPU, and the number of threads."""
    import torch

    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    told = Path("/proc/cpuinfo")
    lines = told.read_text().splitlines() if told.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "flags"))]
    processor = [platform.machine(), platform.processor(), *sorted(set(names))]
    return {"device": device.type, "gpu": gpu, "processor": processor, "threads": torch.get_num_threads()}


def _git(folder: Path, *words: str) -> str | None:
    """What git prints, or None if it fails or is not there; it leaves no lock in the user's checkout, ended or not."""
    command = ["git", "--no-optional-locks", "-C", str(folder), *words]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None
