"""Settings of the test suite: a process a core and one thread each, no network, plugins only where installed."""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path

import pytest

from aegpo.runs.child_processes import usable_cores

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: tiny networks crawl on contended threads
for name in ("COLUMNS", "LINES"):  # readline, which pytest loads, sets them for the processes of workers
    os.environ.pop(name, None)
os.environ["HF_HUB_OFFLINE"] = "1"  # nothing in the suite may depend on a download

MOST_WORKERS = 8  # each has its own torch: about a gigabyte


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """A worker a core; none where files or tests are named: one process answers sooner there, and can be debugged."""
    named = [config.invocation_params.dir / word.partition("::")[0] for word in config.args]
    cores = usable_cores()
    return 0 if cores == 1 or all(path.is_file() for path in named) else min(cores, MOST_WORKERS)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leaves out `plugins/NAME` unless the distribution NAME is installed; CI installs it."""
    if collection_path.parent != config.rootpath / "plugins" or not (collection_path / "pyproject.toml").is_file():
        return None
    try:
        importlib.metadata.distribution(collection_path.name)
    except importlib.metadata.PackageNotFoundError:
        return True
    return None
