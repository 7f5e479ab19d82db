import json
import os
import re
import shutil

import pytest
from command_line import aegpo
from studies import ARMS, World, write_experiment

from aegpo.errors import AegpoError, CheckpointError
from aegpo.models.sd import SdSpec
from aegpo.models.shapes import WEIGHTS, ShapesSpec
from aegpo.report.recorded import read_study
from aegpo.runs import bases
from aegpo.runs.bases import base_of, check_base
from aegpo.runs.records import read_document, write_document

EXPERIMENT = """
name: tiny
training_steps: 2
device: cpu
model: {{kind: shapes, weights: {weights}}}
rewards: [palette]
prompts: {{train_count: 4, evaluation_count: 2}}
rollouts: {{prompts_per_step: 2, rollouts_per_step: 4, denoising_steps: 2}}
evaluation: {{images: 2}}
checkpoint: {{every: 1}}
trackers: [jsonl]
arms: {{grpo: {{}}}}
"""
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def weights(tiny_weights, tmp_path):
    return shutil.copytree(tiny_weights, tmp_path / "weights")


def write_over(weights, bit=0):
    """Changes a weight; size and time of change stay, as on a disk with a coarse clock."""
    path = next(weights.rglob("*.safetensors"))
    content, before = bytearray(path.read_bytes()), path.stat()
    content[-1] ^= 1 << bit
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_base_is_what_is_in_its_folder_and_not_where_it_is(weights, tmp_path):
    base = base_of(ShapesSpec(weights=weights))
    assert base is not None
    assert base == base_of(ShapesSpec(weights=shutil.copytree(weights, tmp_path / "copy")))
    (weights / "README.md").write_text("what it is")
    (weights / ".git").mkdir()
    (weights / ".git" / "HEAD").write_text("x")
    assert base == base_of(ShapesSpec(weights=weights))
    write_over(weights)
    assert base != base_of(ShapesSpec(weights=weights))
    write_over(weights)
    (weights / "more.json").write_text("{}")
    assert base != base_of(ShapesSpec(weights=weights))


def test_the_embedded_model_has_a_base_too():
    base = base_of(ShapesSpec())
    assert base is not None
    assert base == base_of(ShapesSpec(weights=WEIGHTS))


def test_large_files_are_read_once_until_size_or_time_change(weights, monkeypatch):
    monkeypatch.setattr(bases, "LARGE", 0)
    for path in weights.rglob("*"):
        os.utime(path, (1e9, 1e9))
    base = base_of(ShapesSpec(weights=weights))
    write_over(weights)
    assert base_of(ShapesSpec(weights=weights)) == base, "of the same size and time, it is not read again"
    path = next(weights.rglob("*.safetensors"))
    os.utime(path, (1e9, 1e9 + 1))
    assert base_of(ShapesSpec(weights=weights)) != base
    cache = bases.cache_folder(None) / "checksums.json"
    assert cache.is_file()
    cache.write_bytes(b"nonsense")
    assert base_of(ShapesSpec(weights=weights)) != base, "a damaged cache is made again"
    assert read_document(cache, ("files",), "")["files"]


def test_a_file_that_was_just_changed_is_not_kept(weights, monkeypatch):
    monkeypatch.setattr(bases, "LARGE", 0)
    for path in weights.rglob("*"):
        os.utime(path)
    base = base_of(ShapesSpec(weights=weights))
    write_over(weights)
    assert base_of(ShapesSpec(weights=weights)) != base


def test_a_snapshot_of_the_hub_is_known_by_its_commit(tmp_path, monkeypatch):
    snapshot = tmp_path / "models--org--name" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    spec = SdSpec(path=str(snapshot))
    assert base_of(spec) == {"hub": "org/name", "commit": COMMIT}
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert base_of(SdSpec(path="org/not-downloaded")) is None


def test_behind_links_no_folder_is_entered_twice(weights, tmp_path):
    shutil.copytree(weights, tmp_path / "elsewhere" / "part")
    (weights / "part").symlink_to(tmp_path / "elsewhere" / "part")
    base = base_of(ShapesSpec(weights=weights))
    (weights / "part" / "again").symlink_to(weights)
    assert base_of(ShapesSpec(weights=weights)) == base
    write_over(tmp_path / "elsewhere" / "part")
    assert base_of(ShapesSpec(weights=weights)) != base


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_cannot_be_read_is_named(weights):
    (weights / "config.json").chmod(0)
    with pytest.raises(AegpoError, match=r"config\.json cannot be read: Permission denied, so nobody knows"):
        base_of(ShapesSpec(weights=weights))


def test_what_0_1_began_notes_no_base_and_is_not_asked_for_one(weights, tmp_path):
    check_base(tmp_path, None, ShapesSpec(weights=weights))
    with pytest.raises(CheckpointError, match=r"was trained from org/name at commit 0123456789ab, but .*weights has"):
        check_base(tmp_path, {"hub": "org/name", "commit": COMMIT}, ShapesSpec(weights=weights))


def test_a_run_neither_goes_on_nor_is_opened_with_another_base(weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(EXPERIMENT.format(weights=weights))
    command = ("run", "tiny.yaml", "--out", "runs", "--no-report")
    assert aegpo(*command).code == 0
    run = tmp_path / "runs" / "tiny" / "grpo" / "seed-0"
    assert json.loads((run / "manifest.json").read_text())["base"] == base_of(ShapesSpec(weights=weights))
    write_over(weights)
    (run / "finished.json").unlink()
    words = {
        "run": command,
        "sample": ("sample", str(run), "--prompt", "a red circle"),
        "export": ("export", str(run), "--to", "exported"),
        "evaluate": ("evaluate", str(run)),
        "profile-entropy": ("profile-entropy", str(run)),
    }
    for name, command in words.items():
        done = aegpo(*command)
        assert done.code == 2, (name, done)
        assert re.search("was trained from files with SHA-256 .* were changed since; put those back", done.stderr), name
    write_over(weights)
    assert aegpo(*words["run"]).code == 0
    assert aegpo(*words["sample"]).code == 0


def test_a_run_that_learned_nothing_begins_from_the_weights_of_today(weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(EXPERIMENT.format(weights=weights))
    (tmp_path / "fails.py").write_text(
        "import aegpo\n@aegpo.hookimpl\ndef aegpo_on_run_start(run):\n    raise ValueError('not yet')\n"
    )
    command = ("run", "tiny.yaml", "--out", "runs", "--no-report")
    assert aegpo(*command, "--plugin", "fails.py").code == 2
    write_over(weights)
    assert aegpo(*command).code == 0
    manifest = json.loads((tmp_path / "runs/tiny/grpo/seed-0/manifest.json").read_text())
    assert manifest["base"] == base_of(ShapesSpec(weights=weights))


def test_arms_whose_bases_differ_are_named_and_not_compared(tmp_path):
    folder = write_experiment(tmp_path / "study", ARMS[:3], (0, 1), World(training_steps=4))
    noted = {
        ("allocation", 0): "b" * 64,
        ("allocation", 1): "b" * 64,
        ("grpo", 0): "a" * 64,
        ("selection", 0): "a" * 64,
    }
    for (arm, seed), checksum in noted.items():
        path = folder / arm / f"seed-{seed}" / "manifest.json"
        write_document(path, {**json.loads(path.read_text()), "base": {"sha256": checksum}})
    study = read_study(folder)
    assert {arm for arm, _ in study.runs} == {"grpo", "selection"}
    assert len(study.runs) == 4, "what notes no base, as 0.1, is compared"
    assert [note for note in study.notes if "another base" in note] == [
        f"seed {seed} of arm allocation: left out of all tables: it was trained from another base (files with SHA-256 "
        "bbbbbbbbbbbb) than seed 0 of arm grpo (files with SHA-256 aaaaaaaaaaaa), so they cannot be compared; run it "
        "again with --fresh and the same weights"
        for seed in (0, 1)
    ]
    assert not [note for note in study.notes if "not started" in note]
