"""Paths with spaces, other alphabets, links, loops and bytes that are no text; files where folders go; long names."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from surroundings import Surroundings, results_in
from warm import CALM, Warm

OUTS = {
    "spaces and unicode": "a b/ü💥 '\"$(touch PWNED)`x`",
    "newline": "new\nline",
    "dash": "-runs",
    "leading space": " runs",
    "tilde": "~",
    "not UTF-8": os.fsdecode(b"b\xe9d"),
}


@pytest.mark.parametrize("out", OUTS.values(), ids=OUTS)
def test_path(warm: Warm, surroundings: Surroundings, tmp_path, out):
    ended = warm(["run", surroundings.spec, f"--out={out}"], tmp_path)
    surroundings.expect(ended, same=tmp_path / out)
    assert not (tmp_path / "PWNED").exists()


def wait_for(found: Callable[[], object], seconds: float = 200) -> None:
    """Waits until there is something."""
    end = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < end, "waited for too long"
        time.sleep(0.2)


def rows_written(out: Path) -> int:
    """How many steps the runs below a folder have told: their checkpoints come and go between two looks."""
    return sum(path.read_bytes().count(b"\n") for path in out.rglob("metrics.jsonl"))


def test_path_spec_and_out_with_spaces_ctrl_c_and_the_printed_command_goes_on(surroundings: Surroundings, tmp_path):
    odd, out = tmp_path / "sp ec ü.yaml", tmp_path / "o u t ü"
    shutil.copy(surroundings.spec, odd)
    process = surroundings.start("run", odd, "--out", out, "--set", "training_steps=5000")  # never done
    wait_for(lambda: rows_written(out) >= 2)
    process.send_signal(signal.SIGINT)
    text = process.communicate(timeout=100)[0]
    assert process.returncode == 130, text
    found = re.search(r"to go on:\s+aegpo (.*)", text)
    assert found is not None, text
    record = next(out.rglob("metrics.jsonl"))
    before = record.read_bytes().count(b"\n")
    line = f"exec {shlex.quote(sys.executable)} -m aegpo {found[1]}"
    again = subprocess.Popen(["bash", "-c", line], cwd=surroundings.folder, env=os.environ | CALM)
    wait_for(lambda: record.read_bytes().count(b"\n") > before or again.poll() is not None)
    assert again.poll() in (None, 0)
    again.kill()
    again.wait()


def test_path_symlinked_runs_folder(warm: Warm, surroundings: Surroundings, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    surroundings.expect(warm(["run", surroundings.spec, "--out", "link"], tmp_path), same=tmp_path / "real")


@pytest.mark.parametrize(("name", "codes"), [("dangling", (0, 2)), ("loop", (2,))])
def test_path_symlink(warm: Warm, surroundings: Surroundings, tmp_path, name, codes):
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    surroundings.expect(warm(["run", surroundings.spec, "--out", name], tmp_path), *codes)


def test_path_fresh_does_not_follow_a_symlink(warm: Warm, surroundings: Surroundings, tmp_path):
    (tmp_path / "keep").mkdir()
    (tmp_path / "keep" / "precious").write_text("x")
    shutil.copytree(surroundings.finished, tmp_path / "linked")
    images = tmp_path / "linked" / "tiny" / "main" / "seed-0" / "images"
    shutil.rmtree(images)
    images.symlink_to(tmp_path / "keep")
    surroundings.expect(warm(["run", surroundings.spec, "--out", "linked", "--fresh", "--no-report"], tmp_path))
    assert (tmp_path / "keep" / "precious").exists()


NO_FOLDERS = {
    "out is a file": "afile",
    "out below a file": "afile/x",
    "out is too long": "x/" * 2100,
    "/dev/null": "/dev/null",
    "/proc": "/proc/runs",
}


@pytest.mark.parametrize("out", NO_FOLDERS.values(), ids=NO_FOLDERS)
def test_path_that_is_no_folder(warm: Warm, surroundings: Surroundings, tmp_path, out):
    (tmp_path / "afile").write_text("x")
    surroundings.expect(warm(["run", surroundings.spec, "--out", out], tmp_path), 2, words=["--out"])


LONG = 300 * "g"
LONG_NAMES = {
    "experiment name of 300 letters": ("", ["--set", f"name={LONG}"], "name: must be text of at most 100 letters"),
    "arm name of 300 letters": (f"arms:\n  {LONG}: {{}}\n", [], "at most 100 letters, not 300"),
    "arm name of 300 letters among several": (f"arms:\n  {LONG}: {{}}\n  b: {{}}\n", [], "at most 100 letters"),
    "label of 300 letters": ("", ["--set", f"rewards=[{{kind: palette, name: {LONG}}}]"], "at most 100 letters"),
}


@pytest.mark.parametrize(("text", "options", "said"), LONG_NAMES.values(), ids=LONG_NAMES)
def test_path_long_names(warm: Warm, surroundings: Surroundings, tmp_path, text, options, said):
    """Stricter than it was, which took 1 of several arms and any words: the file is refused, with the key's place."""
    path = tmp_path / "long.yaml"
    path.write_text(surroundings.spec.read_text() + text)
    for command in ("check", "run"):
        surroundings.expect(warm([command, path, *options], tmp_path), 2, words=[said])
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "words", [("check",), ("run", "--out", "runs")], ids=["working directory deleted", "run of a deleted directory"]
)
def test_path_working_directory_deleted(surroundings: Surroundings, tmp_path, words):
    gone = tmp_path / "gone"
    gone.mkdir()
    command, *options = words
    line = f"rmdir {gone}; exec AEGPO {command} {surroundings.spec} {' '.join(options)}"
    surroundings.expect(surroundings.shell(line, cwd=gone), 0, 2)


def test_results_are_told_apart(surroundings: Surroundings, tmp_path):
    """The judge itself: another byte is another result."""
    shutil.copytree(surroundings.finished, tmp_path / "other")
    with next((tmp_path / "other").rglob("metrics.jsonl")).open("ab") as file:
        file.write(b"\n")
    assert results_in(tmp_path / "other") != surroundings.results
