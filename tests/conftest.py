"""Shared fixtures: one thread, reproducible property tests, and an untrained network in the embedded model's format."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from aegpo.models.shapes import ShapesSpec

torch.set_num_threads(1)
settings.register_profile("suite", deadline=None, derandomize=True, database=None, max_examples=60)
settings.load_profile("suite")


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory) -> Path:
    from worlds import write_tiny_shapes

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return write_tiny_shapes(tmp_path_factory.mktemp("tiny-shapes"))


@pytest.fixture
def tiny_spec(tiny_weights) -> ShapesSpec:
    """An untrained SD3 transformer of width 16: real layers, real attention, a few milliseconds a call."""
    return ShapesSpec(weights=tiny_weights)


@pytest.fixture
def tiny_model(tiny_spec):
    return tiny_spec.build(torch.device("cpu"))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch) -> None:
    """Prompt embeddings of tests stay out of the user's cache."""
    monkeypatch.setenv("AEGPO_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def pipeline_folders(tmp_path_factory) -> dict[str, Path]:
    """A small saved pipeline of each kind, by kind; see tests/pipelines.py."""
    import pipelines

    root = tmp_path_factory.mktemp("pipelines")
    writers = {"sd": pipelines.write_sd, "sdxl": pipelines.write_sdxl}
    writers |= {"sd3": pipelines.write_sd3, "flux": pipelines.write_flux}
    return {kind: write(root / kind) for kind, write in writers.items()}
