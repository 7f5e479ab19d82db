"""What a file says was run of it: of this file alone, printed by `check`, and no part of any run."""

from __future__ import annotations

import json
from pathlib import Path

import command_line
import pytest

from aegpo.config.loading import load_experiment_file
from aegpo.plugin.manager import load_registries, plugin_manager

BASE = "model: shapes\nrewards: [palette]\n"
MEASURED = """\
measured:
  commit: 0123abc
  date: 2026-01-31
  machine: 2 cores
  command: aegpo run x.yaml
  numbers: README.md
"""


@pytest.fixture
def load(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    registries = load_registries(plugin_manager())

    def load(text: str, name: str = "x.yaml"):
        Path(name).write_text(text)
        return load_experiment_file(Path(name), registries)

    return load


def test_a_file_that_says_nothing_has_none(load):
    assert load(BASE).measured is None


def test_what_was_measured_is_of_the_file_that_says_it_and_not_of_one_that_extends_it(load):
    assert load(BASE + MEASURED).measured.commit == "0123abc"
    assert load("extends: x.yaml\nname: y\n", "y.yaml").measured is None
    assert load("extends: x.yaml\nname: z\nmeasured: never\n", "z.yaml").measured == "never"


def test_a_run_goes_on_whatever_its_file_says_was_measured(load):
    silent, telling = load(BASE).arms["main"], load(BASE + MEASURED).arms["main"]
    assert silent == telling
    assert "measured" not in json.dumps(telling.model_dump(mode="json"))


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ("measured: never\n", "never"),
        (MEASURED, "2026-01-31 at 0123abc, 2 cores: aegpo run x.yaml (numbers: README.md)"),
        (
            MEASURED + "  deviates: 3 of 30 steps\n",
            "2026-01-31 at 0123abc, 2 cores: aegpo run x.yaml (numbers: README.md; deviates: 3 of 30 steps)",
        ),
    ],
    ids=["never", "whole", "in part"],
)
def test_check_prints_what_was_measured(load, more, line):
    load(BASE + more)
    assert command_line.aegpo("check", "x.yaml").stdout.splitlines()[-1] == f"measured: {line}"


def test_check_says_nothing_of_it_where_the_file_does_not(load):
    load(BASE)
    assert "measured:" not in command_line.aegpo("check", "x.yaml").stdout
