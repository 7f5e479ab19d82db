"""The README: its first two blocks are what CI runs, it is short, and its links lead somewhere on a code host, too.

What its blocks do, and those of every other page, is in tests/docs.
"""

from __future__ import annotations

import re

import nox.registry
import pytest
from page_blocks import load
from repository import ROOT

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


def test_the_page_begins_with_pictures_a_table_the_line_for_the_main_job_and_the_line_for_the_tests():
    (main, main_job), (tests, line) = BLOCKS[:2]
    assert main == tests == "bash"
    assert main_job.count("\n") == line.count("\n") == 1
    assert main_job.endswith("&& .venv/bin/aegpo run experiments/ablation.yaml\n")
    assert line.endswith("&& .venv/bin/python -m pytest\n")
    before = TEXT.partition("```")[0]
    assert re.findall(r"!\[.*?\]\((.*?)\)", before) == ["docs/before-after.png", "docs/curve.png"]
    assert "| methods | models |" in before


def test_the_page_is_short():
    assert len(TEXT.splitlines()) < 245


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\(([^)]+)\)", TEXT))))
def test_every_link_leads_to_something_in_the_repository(path):
    assert (ROOT / path).is_file()


def test_every_session_of_nox_is_told_to_contributors(monkeypatch):
    monkeypatch.setattr(nox.registry, "_REGISTRY", {})
    load(ROOT / "noxfile.py")
    told = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert all(name in told for name in nox.registry.get())
