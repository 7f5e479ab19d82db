"""The prompts of HPSv2's benchmark (Wu et al. 2023, arXiv 2306.09341, Sec. 4): 800 in each of four styles."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from aegpo.errors import AegpoError
from aegpo.rewards.weights import unreachable

STYLES = ("anime", "concept-art", "paintings", "photo")  # as hpsv2 names them; the paper calls the first animation
DATASET = "zhwang/HPDv2"
_FOLDER = Path("datasets") / "benchmark"  # below HPS_ROOT, where hpsv2 keeps them


def benchmark_prompts(environment: Mapping[str, str] = os.environ) -> dict[str, tuple[str, ...]]:
    """The prompts of each style, in the order that `hpsv2.benchmark_prompts` has.

    They are read where the hpsv2 package keeps them (below the folder of the environment variable HPS_ROOT, else
    ~/.cache/hpsv2), and otherwise from the hub's cache or the hub.

    Raises:
        AegpoError: if a style's file cannot be had or is no list of texts; the message says the command.
    """
    root = Path(environment.get("HPS_ROOT") or "~/.cache/hpsv2").expanduser()
    return {style: _read(_file(style, root)) for style in STYLES}


def _file(style: str, root: Path) -> Path:
    local = root / _FOLDER / f"{style}.json"
    if local.is_file():
        return local
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    filename = f"benchmark/{style}.json"
    try:
        return Path(hf_hub_download(DATASET, filename, repo_type="dataset"))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        options = "--repo-type dataset"
        raise unreachable("prompts hpsv2", DATASET, filename, "HPS_ROOT", error, options) from error


def _read(path: Path) -> tuple[str, ...]:
    try:
        prompts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AegpoError(f"prompts hpsv2: {path} cannot be read: {error}") from error
    if not isinstance(prompts, list) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise AegpoError(f"prompts hpsv2: {path} is no list of texts, as the benchmark's files are")
    return tuple(prompts)
