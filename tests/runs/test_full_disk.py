"""A disk that takes no more: one message, and nothing half-written."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from test_sample_and_export import run
from worlds import CPU, asked

from aegpo.errors import AegpoError
from aegpo.method.signals.base_entropies import BaseCurves
from aegpo.models.sd3 import Sd3Spec
from aegpo.prompts.lists import numbered


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """Inside, no file may grow beyond so many bytes: the system refuses it as it refuses a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_trackers_that_cannot_write_end_the_run_with_one_message(tiny_weights, tmp_path):
    model, counts = f"{{kind: shapes, weights: {tiny_weights}}}", "{train_count: 4, evaluation_count: 150}"
    with pytest.raises(AegpoError) as error, files_up_to(9000):  # an evaluation of 150 prompts has more
        run(tmp_path, model, counts, "{train: full}")
    folder = tmp_path / "small" / "main" / "seed-0"
    assert str(error.value) == (
        f"{folder} cannot be written to: File too large; make room, then give the same command again: it goes on from "
        "the newest checkpoint"
    )
    assert not list(folder.rglob("*.tmp"))
    assert run(tmp_path, model, counts, "{train: full}") == folder
    assert (folder / "finished.json").exists()


def test_entropies_of_the_base_that_cannot_be_kept_leave_no_half_a_file(tmp_path):
    curves = BaseCurves()
    curves.open(tmp_path, 0, {"model": "any"})
    curves.add(1, numbered(map(str, range(100))), np.zeros((100, 50)))
    with files_up_to(1000), pytest.raises(OSError, match="File too large"):
        curves.write(1)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    curves.write(1)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1


def test_prompts_that_cannot_be_kept_name_the_folder_and_its_setting(pipeline_folders, tmp_path):
    cache = tmp_path / "cache"
    spec = Sd3Spec(path=str(pipeline_folders["sd3"]), cache=cache, height=16, width=16, dtype="float32", guidance=1.0)
    model = spec.build(CPU)
    with files_up_to(1000), pytest.raises(AegpoError) as error:
        model.prepare(asked(["a red circle"]))
    assert str(error.value).startswith(f"prompt embeddings cannot be kept in {cache / 'prompts'}: ")
    assert str(error.value).endswith("make room, or choose another folder with 'model.cache' or $AEGPO_CACHE")
    assert [path for path in cache.rglob("*") if path.is_file()] == []
    assert torch.isfinite(model.encode(asked(["a red circle"])).text).all()
