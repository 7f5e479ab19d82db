"""What people reported of places that are links, disks that lack something, and runs opened from elsewhere.

brockamer/findajob PR 860, huggingface/datasets 2618, untitaker/python-atomicwrites 27, microsoft/onnxruntime-genai
PR 955.
"""

from __future__ import annotations

import warnings

import pytest
from surroundings import Surroundings
from warm import CALM

PATCH = "import errno, fcntl, os, stat\n{}\n"
WITHOUT_LOCKS = """\
def refuse(*words):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

fcntl.flock = fcntl.lockf = refuse
"""
WITHOUT_SYNC = """\
real = os.fsync

def sync(descriptor):
    if stat.S_ISDIR(os.fstat(descriptor).st_mode):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    return real(descriptor)

os.fsync = sync
"""


def test_out_is_a_link(warm, write_experiment, tmp_path):
    path = write_experiment()
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to("real")
    ended = warm(["evaluate", path, "--out", "out"], tmp_path)
    assert (ended.code, ended.traceback) == (2, False)
    assert ended.error.startswith("error: --out out: is a link")
    assert "kept" not in ended.out  # nothing was painted


@pytest.mark.parametrize("command", ["evaluate", "profile-entropy"])
def test_out_is_here(warm, write_experiment, tmp_path, command):
    path = write_experiment()
    (tmp_path / "empty").mkdir()
    ended = warm([command, path, "--out", "."], tmp_path / "empty")
    assert (ended.code, ended.traceback) == (2, False)
    assert ended.error.startswith("error: --out .: ")


def test_export_to_here(warm, write_experiment, tmp_path):
    path = write_experiment(policy={"train": "lora", "rank": 2, "alpha": 2}, training_steps=1)
    assert warm(["run", path, "--out", "out", "--no-report"], tmp_path).code == 0
    run = next((tmp_path / "out").rglob("manifest.json")).parent
    (tmp_path / "empty").mkdir()
    ended = warm(["export", run, "--to", "."], tmp_path / "empty")
    assert (ended.code, ended.traceback) == (2, False), ended.out


def test_relative_model_path_from_elsewhere(warm, write_experiment, tmp_path):
    from pipelines import write_sd3

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write_sd3(tmp_path / "models" / "sd3")
    (tmp_path / "t.txt").write_text("a red circle\ntwo blue squares\na green square\nfour purple circles\n")
    (tmp_path / "e.txt").write_text("a blue circle\ntwo red squares\n")
    path = write_experiment(
        model={"kind": "sd3", "path": "models/sd3", "height": 24, "width": 24, "cache": "cache"},
        policy={"train": "lora", "rank": 2, "alpha": 2},
        prompts={"train": "t.txt", "train_count": 4, "evaluation": "e.txt", "evaluation_count": 2},
        training_steps=1,
    )
    ended = warm(["run", path, "--out", "out", "--no-report"], tmp_path)
    assert ended.code == 0, ended.out
    run = next((tmp_path / "out").rglob("manifest.json")).parent
    (tmp_path / "elsewhere").mkdir()
    ended = warm(["sample", run, "--prompt", "a red circle"], tmp_path / "elsewhere")
    assert ended.code == 0, ended.out


def patched(surroundings: Surroundings, tmp_path, code):
    """How a run ends where Python's own calls are these."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(PATCH.format(code))
    environment = {"PYTHONPATH": f"{CALM['PYTHONPATH']}:{tmp_path / 'site'}"}
    return surroundings.run("run", "spec.yaml", "--out", tmp_path / "out", environment=environment)


def test_disk_without_locks(surroundings: Surroundings, tmp_path):
    ended = patched(surroundings, tmp_path, WITHOUT_LOCKS)
    surroundings.expect(ended, 0, 2, same=tmp_path / "out")


def test_disk_that_cannot_sync_folders(surroundings: Surroundings, tmp_path):
    surroundings.expect(patched(surroundings, tmp_path, WITHOUT_SYNC), same=tmp_path / "out")
