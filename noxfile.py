"""Sessions for developers, each in an environment of its own: `nox` runs those of CI, `nox -s NAME` one of them."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import nox

nox.options.sessions = ["lint", "types", "tests", "smoke", "docs", "plugins", "hpsv2", "bitsandbytes"]
nox.options.reuse_existing_virtualenvs = True

PINNED = {"PIP_CONSTRAINT": str(Path(__file__).parent / "constraints.txt")}
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
DOCS = ("tests/test_readme.py", "tests/config/test_experiments.py", "tests/test_installation.py")
LOWER_BOUND = re.compile(r"(?P<name>[A-Za-z0-9._-]+)>=(?P<version>[0-9.]+)")


@nox.session
def tests(session: nox.Session) -> None:
    """The test suite; arguments after -- go to pytest."""
    session.install("-e", ".[dev]", env=PINNED)
    session.run("pytest", "-n", "2", *session.posargs, env=ONE_THREAD)


@nox.session
def lint(session: nox.Session) -> None:
    """Ruff: lint and format, changing nothing."""
    session.install("ruff", env=PINNED)
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")


@nox.session
def types(session: nox.Session) -> None:
    """Mypy, strict."""
    session.install("-e", ".[dev]", env=PINNED)
    session.run("mypy")


@nox.session
def smoke(session: nox.Session) -> None:
    """The smallest experiment from start to report."""
    session.install("-e", ".", env=PINNED)
    session.run("aegpo", "run", "experiments/smoke.yaml", "--out", session.create_tmp(), "--fresh")


@nox.session
def docs(session: nox.Session) -> None:
    """Every README block, experiment file and install line."""
    session.install("-e", ".[dev]", env=PINNED)
    session.run("pytest", *DOCS, env=ONE_THREAD)


@nox.session
def plugins(session: nox.Session) -> None:
    """The plugins of this repository, installed as a stranger's would be, and their tests."""
    session.install("-e", ".[dev]", env=PINNED)
    for project in sorted(Path("plugins").glob("*/pyproject.toml")):
        session.install("--no-deps", "-e", str(project.parent), env=PINNED)
    session.run("aegpo", "plugins")
    session.run("pytest", "plugins", env=ONE_THREAD)


@nox.session
def hpsv2(session: nox.Session) -> None:
    """Reward `hpsv2` against the hpsv2 package itself, on the same weights."""
    session.install("-e", ".[dev]", env=PINNED)
    session.install("--no-deps", "-r", "requirements/hpsv2.txt", env=PINNED)
    session.run("pytest", "tests/rewards/test_hpsv2_package.py", env=ONE_THREAD)


@nox.session
def bitsandbytes(session: nox.Session) -> None:
    """8-bit AdamW with bitsandbytes itself, which has kernels for CPUs."""
    session.install("-e", ".[dev,bitsandbytes]", env=PINNED)
    session.run("pytest", "tests/train/test_moments.py", env=ONE_THREAD)


@nox.session
def minimums(session: nox.Session) -> None:
    """The test suite on the oldest direct dependencies that pyproject.toml allows; gigabytes, so not in CI."""
    session.install("-e", ".[dev]", *oldest_dependencies(Path("pyproject.toml")))
    session.run("pytest", "-n", "2", *session.posargs, env=ONE_THREAD)


def oldest_dependencies(path: Path) -> list[str]:
    """`name==version` of every direct dependency's lower bound."""
    project = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
    matches = [LOWER_BOUND.match(requirement) for requirement in project["dependencies"]]
    assert all(matches), "every dependency in pyproject.toml has a lower bound"
    return [f"{match['name']}=={match['version']}" for match in matches if match]
