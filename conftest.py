"""Settings of the test suite: one thread a process, no network, and tests of a plugin only where it is installed."""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: tiny networks crawl on contended threads
os.environ["HF_HUB_OFFLINE"] = "1"  # nothing in the suite may depend on a download


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leaves out `plugins/NAME` unless the distribution NAME is installed; CI installs it."""
    if collection_path.parent != config.rootpath / "plugins" or not (collection_path / "pyproject.toml").is_file():
        return None
    try:
        importlib.metadata.distribution(collection_path.name)
    except importlib.metadata.PackageNotFoundError:
        return True
    return None
