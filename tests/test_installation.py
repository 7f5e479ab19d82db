"""What a new user and CI install: the README's lines, the pins, the licence, the sessions."""

from __future__ import annotations

import importlib.metadata
import re
import runpy
import tomllib

import nox.registry
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from repository import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PINS = {
    canonicalize_name(name): version
    for name, version in re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
}
EXTRAS = [requirement for group in PROJECT["optional-dependencies"].values() for requirement in group]
DIRECT = [Requirement(text) for text in PROJECT["dependencies"] + EXTRAS if not text.startswith("aegpo")]


def readme_lines():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(r"^python3 -m venv .*$", text, re.MULTILINE)


def test_ci_runs_the_lines_of_the_readme_word_for_word():
    script = (ROOT / ".ci" / "run").read_text()
    main_job, tests = readme_lines()
    set_up, _, run = main_job.rpartition(" && ")
    assert f"{{ {tests}; }}" in script
    assert f"{{ {set_up}; }}" in script
    assert run.replace("ablation", "smoke") in script


def test_ci_runs_every_session_that_these_lines_leave_out(monkeypatch):
    monkeypatch.setattr(nox.registry, "_REGISTRY", {})
    runpy.run_path(str(ROOT / "noxfile.py"))
    sessions = nox.registry.get()
    assert {name for name, session in sessions.items() if "more" not in session.tags} == {
        "smoke",
        "tests",
        "minimums",
        "faults",
        "slurm",
        "ray",
        "gpu",
    }
    script = (ROOT / ".ci" / "run").read_text()
    assert ".venv/bin/nox --list --tags more" in script
    assert 'for name in $sessions; do stage "nox -s $name" .venv/bin/nox -s "$name"; done' in script


def test_every_constraint_is_one_exact_version():
    text = (ROOT / "constraints.txt").read_text()
    rows = [row for row in text.splitlines() if row and not row.startswith("#")]
    assert len(rows) == len(PINS)


@pytest.mark.parametrize("requirement", DIRECT, ids=lambda requirement: requirement.name)
def test_every_direct_dependency_is_pinned_to_a_version_it_allows(requirement):
    assert PINS[canonicalize_name(requirement.name)] in requirement.specifier


@pytest.mark.parametrize("text", PROJECT["dependencies"])
def test_every_dependency_names_the_oldest_version_it_needs(text):
    operators = {specifier.operator for specifier in Requirement(text).specifier}
    assert ">=" in operators


def test_the_licence_is_apache_2():
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text.splitlines()[0]
    assert "END OF TERMS AND CONDITIONS" in text
    assert PROJECT["license"] == "Apache-2.0"


def test_the_version_of_the_package_is_that_of_the_distribution():
    import aegpo

    assert aegpo.__version__ == PROJECT["version"] == importlib.metadata.version("aegpo")
