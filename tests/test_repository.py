"""Which files count as the repository's, and how many processes test them."""

from __future__ import annotations

import copy
import subprocess

import pytest
from repository import ROOT, shipped

from aegpo.runs.child_processes import usable_cores


def test_what_a_user_saved_in_a_checkout_does_not_ship(tmp_path):
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / "below").mkdir()
    for name in ("ours.yaml", "below/ours too.yaml", "mine.yaml"):
        (tmp_path / name).touch()
    subprocess.run(["git", "add", "ours.yaml", "below"], cwd=tmp_path, check=True)
    assert shipped(tmp_path, "*.yaml") == [tmp_path / "below" / "ours too.yaml", tmp_path / "ours.yaml"]


def test_outside_of_a_checkout_every_file_ships(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    (tmp_path / "a.yaml").touch()
    (tmp_path / "a.txt").touch()
    assert shipped(tmp_path, "*.yaml") == [tmp_path / "a.yaml"]


@pytest.mark.parametrize(
    ("named", "apart"),
    [
        (["tests", "plugins"], True),
        (["tests/train", "tests/test_readme.py"], True),
        (["tests/test_readme.py"], False),
        (["tests/test_readme.py::test_a", "tests/test_installation.py"], False),
    ],
)
def test_files_and_tests_that_are_named_run_in_one_process_and_folders_in_one_a_core(named, apart, request):
    config = copy.copy(request.config)
    config.args = [str(ROOT / word) for word in named]
    workers = config.hook.pytest_xdist_auto_num_workers(config=config)
    assert workers == (min(usable_cores(), 8) if apart and usable_cores() > 1 else 0)
