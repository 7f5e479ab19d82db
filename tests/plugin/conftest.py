"""A place for plugins."""

from __future__ import annotations

import importlib.metadata

import pytest


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder on the path with nothing installed but what a test installs there."""
    monkeypatch.delenv("AEGPO_BLOCK_PLUGINS", raising=False)
    installed = {entry.dist.name for entry in importlib.metadata.entry_points(group="aegpo")}
    if installed:
        monkeypatch.setenv("AEGPO_BLOCK_PLUGINS", ",".join(installed))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path
