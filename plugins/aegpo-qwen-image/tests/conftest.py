"""One small pipeline for all tests, and a cache of prompt embeddings that is not the user's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch) -> None:
    monkeypatch.setenv("AEGPO_CACHE", str(tmp_path_factory.getbasetemp() / "qwen-image-cache"))


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """A QwenImagePipeline as `save_pretrained` writes it."""
    from small_qwen_image import write_qwen_image

    return write_qwen_image(tmp_path_factory.mktemp("qwen-image"))
