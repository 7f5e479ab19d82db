"""Prompt embeddings on disk: preparing looks at their heads only, and encoding reads each of them once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from worlds import CPU, asked

from aegpo.models.pipeline import prompts
from aegpo.models.sd3 import Sd3Spec

TEXTS = ["a red circle", "two blue squares", "a red circle", "a green triangle"]


@pytest.fixture
def read(monkeypatch) -> list[Path]:
    """The files that were read whole, in order."""
    found: list[Path] = []
    load = prompts.load_file

    def noted(path, *args, **options):
        found.append(Path(path))
        return load(path, *args, **options)

    monkeypatch.setattr(prompts, "load_file", noted)
    return found


@pytest.fixture
def model(pipeline_folders, tmp_path):
    path = str(pipeline_folders["sd3"])
    model = Sd3Spec(path=path, cache=tmp_path, height=16, width=16, dtype="float32", guidance=1.0).build(CPU)
    model.prepare(asked(TEXTS))
    return model


def test_preparing_what_is_kept_reads_nothing_whole(model, read):
    model.prepare(asked(TEXTS))
    assert read == []


def test_encoding_reads_each_text_once(model, read):
    cond = model.encode(asked(TEXTS))
    assert len(read) == len(set(read)) == 3
    assert torch.equal(cond.text[0], cond.text[2])
    assert not torch.equal(cond.text[0], cond.text[1])


@pytest.mark.parametrize("length", [0, 4, 20, -1])
def test_a_file_that_was_cut_short_anywhere_is_noticed_by_its_head(model, tmp_path, length):
    kept = model.encode(asked(TEXTS))
    for file in tmp_path.rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:length])
    assert torch.equal(model.encode(asked(TEXTS)).text, kept.text)
