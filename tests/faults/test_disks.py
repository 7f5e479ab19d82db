"""Disks that are full or may not be written to: one message, exit code 2, and with room again the reference's bytes."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from surroundings import LAST_STEP, Surroundings, disk, remount, results_in, root_only
from warm import Warm

pytestmark = root_only
SHARES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97)
RUN = Path("tiny", "main", "seed-0")
SEVERAL = ("--set", "seeds=[0, 1]", "--jobs", "2")


def used(surroundings: Surroundings) -> int:
    """What the reference takes on disk, kB, by blocks of 4."""
    files = [path for path in surroundings.finished.rglob("*") if path.is_file() or path.is_dir()]
    return sum(4 * -(-path.stat().st_size // 4096) for path in files)


@pytest.mark.parametrize("share", SHARES, ids=[f"full disk at {share:.0%}" for share in SHARES])
def test_a_disk_that_is_full_is_said_and_with_room_again_the_run_ends_as_the_reference(
    warm: Warm, surroundings: Surroundings, tmp_path, share
):
    place = tmp_path / "disk"
    command = ["run", "spec.yaml", "--out", place / "runs"]
    with disk(place, f"size={max(4, int(used(surroundings) * share))}k"):
        ended = warm(command, surroundings.folder)
        surroundings.expect(ended, 2)
        assert re.search("space|room", ended.out)
        remount(place, "size=200m")
        surroundings.expect(warm(command, surroundings.folder), same=place / "runs")
        assert [path.name for path in place.rglob(".*tmp*")] == []


def test_full_disk_several_runs(warm: Warm, surroundings: Surroundings, tmp_path):
    """Stricter than it was, which took any code and a message a run: one message, exit code 2."""
    place = tmp_path / "disk"
    command = ["run", "spec.yaml", "--out", place / "runs", *SEVERAL]
    with disk(place, f"size={int(used(surroundings) * 0.4)}k"):
        ended = warm(command, surroundings.folder)
        surroundings.expect(ended, 2, words=["the disk refused what 2 of 2 runs wrote"])
        remount(place, "size=200m")
        surroundings.expect(warm(command, surroundings.folder), same=place / "runs")


def test_no_inodes_left(warm: Warm, surroundings: Surroundings, tmp_path):
    place = tmp_path / "disk"
    with disk(place, "size=50m,nr_inodes=12"):
        ended = warm(["run", "spec.yaml", "--out", place / "runs"], surroundings.folder)
        surroundings.expect(ended, 2, words=["space"])


@pytest.fixture(scope="module")
def begun(surroundings: Surroundings, tmp_path_factory) -> Iterator[Path]:
    """A disk that is read-only, with a run that lacks its last step below `runs`."""
    place = tmp_path_factory.mktemp("begun") / "disk"
    with disk(place, "size=60m"):
        shutil.copytree(surroundings.finished, place / "runs")
        shutil.rmtree(place / "runs" / RUN / "checkpoints" / LAST_STEP)
        (place / "runs" / RUN / "finished.json").unlink()
        remount(place, "ro")
        yield place


@pytest.fixture(scope="module")
def ended_there(surroundings: Surroundings, tmp_path_factory) -> Iterator[Path]:
    """A disk that is read-only, with a finished run below `runs`."""
    place = tmp_path_factory.mktemp("ended") / "disk"
    with disk(place, "size=60m"):
        shutil.copytree(surroundings.finished, place / "runs")
        remount(place, "ro")
        yield place


@pytest.mark.parametrize("out", ["runs", "new"], ids=["a run that began", "a new run"])
def test_read_only_disk(warm: Warm, surroundings: Surroundings, begun, out):
    ended = warm(["run", "spec.yaml", "--out", begun / out], surroundings.folder)
    surroundings.expect(ended, 2, words=["Read-only"])


@pytest.mark.parametrize("changes", [(), ("--set", "seeds=[0, 1]")], ids=["a finished run and its report", "several"])
def test_read_only_disk_that_has_runs(warm: Warm, surroundings: Surroundings, ended_there, changes):
    ended = warm(["run", "spec.yaml", "--out", ended_there / "runs", *changes], surroundings.folder)
    surroundings.expect(ended, 2, words=["Read-only"])


def test_read_only_disk_several_that_began(warm: Warm, surroundings: Surroundings, begun):
    """Added: here nothing but the runs' own folders tells."""
    command = ["run", begun / "runs" / "tiny", "--jobs", "2"]
    surroundings.expect(warm(command, surroundings.folder), 2, words=["Read-only"])


def test_read_only_disk_sample_into_it(warm: Warm, surroundings: Surroundings, ended_there):
    words = ["sample", ended_there / "runs" / RUN, "--prompt", "a red circle", "--out", ended_there / "s"]
    surroundings.expect(warm(words, surroundings.folder), 2, words=["Read-only"])


def test_read_only_disk_sample_elsewhere(warm: Warm, surroundings: Surroundings, ended_there, tmp_path):
    words = ["sample", ended_there / "runs" / RUN, "--prompt", "a red circle", "--out", tmp_path / "s"]
    surroundings.expect(warm(words, surroundings.folder))
    assert results_in(ended_there / "runs") == surroundings.results
