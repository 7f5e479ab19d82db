"""The files that ship: those git tracks. What a user saved beside them, such as an experiment, is not looked at."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LARGE = ("flux_aegpo", "flux_dance_grpo", "sdxl_aegpo")  # whose networks are built, without weights, for their sizes


def shipped(folder: Path, pattern: str) -> list[Path]:
    """Files below a folder that match, in order; outside of a checkout, where git knows nothing, all there are."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=folder, capture_output=True, text=True, check=False)
    found = [path for path in folder.rglob(pattern) if path.is_file()]
    if listed.returncode == 0 and listed.stdout:
        tracked = {folder / name for name in listed.stdout.split("\0")}
        found = [path for path in found if path in tracked]
    return sorted(found)


def sized(experiments: Iterable[Path]) -> pytest.MarkDecorator:
    """Parametrizes a test that looks at the sizes of networks: it is slow for the large ones."""
    paths = [pytest.param(path, marks=[pytest.mark.slow] if path.stem in LARGE else []) for path in experiments]
    return pytest.mark.parametrize("path", paths, ids=lambda path: path.stem)
