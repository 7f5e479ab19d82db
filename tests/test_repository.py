"""Which files count as the repository's."""

from __future__ import annotations

import subprocess

from repository import shipped


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
