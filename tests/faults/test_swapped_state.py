"""What belongs to another run, folders that are gone, strangers among the files: the same bytes, or refused by name."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from damage import RECORDS, Made, digest, judge, make, replace, result, run_folder, sign
from warm import CALM

CHECKPOINT = "checkpoints/step-000002"
Act = Callable[[Path], object]  # gets the folder of the experiment


@pytest.fixture(scope="module")
def made(warm, tiny, tmp_path_factory) -> Made:
    return make(warm, tiny, tmp_path_factory.mktemp("swaps"))


@pytest.fixture
def out(made, tmp_path):
    """A copy of the runs that stopped."""
    shutil.copytree(made.stopped, tmp_path / "runs", symlinks=True)
    return tmp_path / "runs"


def of_other(source: str, name: str) -> Act:
    """Puts what another run has in the place of what `aegpo` seed 0 has."""

    def act(folder: Path) -> None:
        other, own = folder / source / name, folder / "aegpo" / "seed-0" / name
        replace(other, own) if other.is_dir() else shutil.copy(other, own)

    return act


def instead(name: str) -> Act:
    """A file in the place of a folder."""

    def act(folder: Path) -> None:
        shutil.rmtree(folder / "aegpo" / "seed-0" / name)
        (folder / "aegpo" / "seed-0" / name).write_text("x")

    return act


def stray(name: str) -> Act:
    """A file that nobody of ours wrote."""
    return lambda folder: (folder / "aegpo" / "seed-0" / name).write_text("x")


def gone(name: str) -> Act:
    """A folder is deleted."""
    return lambda folder: shutil.rmtree(folder / "aegpo" / "seed-0" / name)


def earlier_step(folder: Path) -> None:
    """Step 1 under the name of step 2."""
    checkpoints = folder / "aegpo" / "seed-0" / "checkpoints"
    replace(checkpoints / "step-000001", checkpoints / "step-000002")


def later_step(folder: Path) -> None:
    """Step 2 under the name of step 9."""
    checkpoints = folder / "aegpo" / "seed-0" / "checkpoints"
    (checkpoints / "step-000002").rename(checkpoints / "step-000009")


def no_manifest_either(folder: Path) -> None:
    """The manifest is deleted with the checkpoints."""
    gone("checkpoints")(folder)
    (folder / "aegpo" / "seed-0" / "manifest.json").unlink()


def both_damaged(folder: Path) -> None:
    """No checkpoint is left."""
    for step in (1, 2):
        (folder / "aegpo" / "seed-0" / "checkpoints" / f"step-00000{step}" / "policy.safetensors").write_bytes(b"")


def path_outside(folder: Path) -> None:
    """A checksum of a file that is not of the checkpoint."""
    run = folder / "aegpo" / "seed-0"
    path = run / CHECKPOINT / "checksums.json"
    content = json.loads(path.read_text())
    content["sha256"]["../../manifest.json"] = digest(run / "manifest.json")
    path.write_text(json.dumps(content))


def no_key(folder: Path) -> None:
    """A state without its keys, under right checksums."""
    checkpoint = folder / "aegpo" / "seed-0" / CHECKPOINT
    (checkpoint / "state.json").write_text('{"format": 1}')
    sign(checkpoint)


def no_average(folder: Path) -> None:
    """The averaged weights are left out, under right checksums."""
    checkpoint = folder / "aegpo" / "seed-0" / CHECKPOINT
    (checkpoint / "ema.safetensors").unlink()
    sign(checkpoint)


def left_by_a_crash(folder: Path) -> None:
    """Temporary files."""
    for name in (".manifest.json.1.tmp", ".metrics.jsonl.1.tmp"):
        stray(name)(folder)


# name -> what is done, what a refusal names
ACTS: dict[str, tuple[Act, str]] = {
    "swapped: checkpoint of another arm": (of_other("grpo/seed-0", CHECKPOINT), "step-000002"),
    "swapped: checkpoint of another seed": (of_other("aegpo/seed-1", CHECKPOINT), "step-000002"),
    "swapped: all checkpoints of another seed": (of_other("aegpo/seed-1", "checkpoints"), "step-000002"),
    "swapped: whole run of another seed": (lambda t: replace(t / "aegpo" / "seed-1", t / "aegpo" / "seed-0"), "seed"),
    "swapped: signals of another seed": (of_other("aegpo/seed-1", "signals"), "signals"),
    "swapped: step 1 under the name of step 2": (earlier_step, "step-000002"),
    "swapped: step 2 under the name of step 9": (later_step, "step-000009"),
    "swapped: metrics of another seed": (of_other("aegpo/seed-1", "metrics.jsonl"), "metrics.jsonl"),
    "swapped: evaluations of another seed": (of_other("aegpo/seed-1", "evaluations.jsonl"), "evaluations.jsonl"),
    "swapped: evaluations of another arm": (of_other("grpo/seed-0", "evaluations.jsonl"), "evaluations.jsonl"),
    "swapped: images of another seed": (of_other("aegpo/seed-1", "images"), "images"),
    "folder checkpoints deleted": (gone("checkpoints"), "checkpoints"),
    "folder signals deleted": (gone("signals"), "signals"),
    "folder images deleted": (gone("images"), "images"),
    f"folder {CHECKPOINT} deleted": (gone(CHECKPOINT), "step-000002"),
    "folder checkpoints deleted, manifest too": (no_manifest_either, "manifest.json"),
    "both checkpoints damaged": (both_damaged, "policy.safetensors"),
    "a file where checkpoints/ should be": (instead("checkpoints"), "checkpoints"),
    "a file where signals/ should be": (instead("signals"), "signals"),
    "a file where images/ should be": (instead("images"), "images"),
    "a stray file in checkpoints/": (stray("checkpoints/step-abc"), "step-abc"),
    "a file called step-000007 in checkpoints/": (stray("checkpoints/step-000007"), "step-000007"),
    "a file called step-000004 in checkpoints/": (stray("checkpoints/step-000004"), "step-000004"),
    "a file called .x.tmp in checkpoints/": (stray("checkpoints/.x.tmp"), ".x.tmp"),
    "images/step-final.png of the user": (stray("images/step-final.png"), "step-final.png"),
    "an extra file in a checkpoint": (stray(f"{CHECKPOINT}/extra.safetensors"), "extra.safetensors"),
    "path outside in checksums.json": (path_outside, "checksums.json"),
    "state.json without a key, checksums right": (no_key, "state.json"),
    "ema.safetensors of a stranger left out, checksums right": (no_average, "step-000002"),
    "temporary files of a crash": (left_by_a_crash, "tmp"),
}
OF_THE_USER = ("images/step-final.png of the user",)


@pytest.mark.parametrize("name", ACTS)
def test_what_is_not_the_run_s_own_changes_nothing_or_is_refused_by_name(made, out, name):
    act, named = ACTS[name]
    act(out / "tiny")
    ended = made.go(out)
    own = run_folder(out) / "images" / "step-final.png"
    if name in OF_THE_USER:
        assert own.read_text() == "x", "the user's own file stays"
        own.unlink()
    judge(made, ended, out, re.escape(named))


def test_the_final_checkpoint_of_another_folder_s_run_is_refused_for_what_the_record_lacks(made, out):
    replace(run_folder(made.whole) / "checkpoints/step-000004", run_folder(out) / "checkpoints/step-000004")
    assert judge(made, made.go(out), out, "metrics.jsonl") == "refused"


# --- several runs: a process of its own each, and one that reads their records as they grow ---------------------------


def in_front(name: str, content: bytes) -> Act:
    def act(folder: Path) -> None:
        path = folder / "aegpo" / "seed-0" / name
        path.write_bytes(content + path.read_bytes())

    return act


def half_a_row(folder: Path) -> None:
    with (folder / "aegpo" / "seed-0" / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 3, "me')


SEVERAL: dict[str, Act] = {
    "a damaged row in metrics.jsonl": in_front("metrics.jsonl", b"#"),
    "a row that is a list in metrics.jsonl": in_front("metrics.jsonl", b"[]\n"),
    "a damaged row in evaluations.jsonl": in_front("evaluations.jsonl", b"{}\n"),
    "run.log is a folder": lambda folder: (folder / "aegpo" / "seed-0" / "run.log").mkdir(),
    "half a row at the end": half_a_row,
}


@pytest.mark.parametrize("name", SEVERAL)
def test_of_several_runs_the_damaged_one_fails_alone(made, out, name):
    SEVERAL[name](out / "tiny")
    words = [sys.executable, "-m", "aegpo", "run", str(made.folder / "tiny.yaml"), "--out", str(out), "--arm", "aegpo"]
    words += ["--jobs", "2", "--no-report"]
    done = subprocess.run(
        words, cwd=made.folder, env=os.environ | CALM, capture_output=True, text=True, check=False, timeout=400
    )
    assert result(out, seed=1) == result(made.whole, seed=1)
    assert "Traceback (most recent" not in done.stderr
    if done.returncode == 0:
        assert result(out) == result(made.whole)
        return
    assert done.returncode == 1, done.stderr
    assert "error: aegpo seed 0 failed" in done.stderr
    broken = "run.log" if "run.log" in name else next((each for each in RECORDS if each in name), "")
    assert broken in done.stderr
