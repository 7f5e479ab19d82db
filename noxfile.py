"""Sessions for developers and CI, in the environment that nox itself is installed in: `.venv/bin/nox`.

All but `minimums`, `faults`, `slurm`, `ray` and `gpu` by default. `nox -t more` is what the README's own lines, which
`.ci/run` runs, leave out.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
import tomllib
from pathlib import Path

import nox

nox.needs_version = ">=2025.5.1"
nox.options.default_venv_backend = "none"

ROOT = Path(__file__).parent
BIN = Path(sys.executable).parent
PINNED = {"PIP_CONSTRAINT": str(ROOT / "constraints.txt"), "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_QUIET": "1"}
LOWER_BOUND = re.compile(r"(?P<name>[A-Za-z0-9._-]+)>=(?P<version>[0-9.]+)")


@nox.session(tags=["more"])
def lint(session: nox.Session) -> None:
    """Ruff, changing nothing: lint and format. Import-linter: which room imports which."""
    session.run(BIN / "ruff", "check")
    session.run(BIN / "ruff", "format", "--check")
    session.run(BIN / "lint-imports", "--no-cache")


@nox.session(tags=["more"])
def types(session: nox.Session) -> None:
    """Mypy, strict."""
    session.run(BIN / "mypy")


@nox.session
def smoke(session: nox.Session) -> None:
    """The smallest experiment from start to report."""
    session.run(BIN / "aegpo", "run", "experiments/smoke.yaml", "--out", session.create_tmp(), "--fresh")


@nox.session
def tests(session: nox.Session) -> None:
    """The tests of the README's line; arguments after -- go to pytest."""
    pytest(session, *session.posargs)


@nox.session(tags=["more"])
def slow(session: nox.Session) -> None:
    """The tests under the mark `slow`, which the README's line leaves out."""
    pytest(session, "-m", "slow and not faults", "--durations=40", *session.posargs)


@nox.session(default=False)
def faults(session: nox.Session) -> None:
    """Everything that breaks parts, files, servers and machines from outside: about an hour of processor time."""
    pytest(session, "tests/faults", "-m", "faults", *session.posargs)


@nox.session(tags=["more"])
def sample(session: nox.Session) -> None:
    """Every tenth case of session `faults`."""
    pytest(session, "tests/faults", "-m", "faults", "--every", "10", *session.posargs)


@nox.session(tags=["more"])
def plugins(session: nox.Session) -> None:
    """The plugins of this repository, installed as a stranger's would be, and their tests."""
    for project in sorted(ROOT.glob("plugins/*/pyproject.toml")):
        install(session, "--no-deps", "-e", str(project.parent))
    session.run(BIN / "aegpo", "plugins")
    pytest(session, "plugins", "-m", "")


@nox.session(tags=["more"])
def hpsv2(session: nox.Session) -> None:
    """Reward `hpsv2` against the hpsv2 package itself, on the same weights."""
    install(session, "--no-deps", "-r", "requirements/hpsv2.txt")
    pytest(session, "tests/rewards/test_hpsv2_package.py", "-m", "")


@nox.session(tags=["more"])
def bitsandbytes(session: nox.Session) -> None:
    """8-bit AdamW with bitsandbytes itself, which has kernels for CPUs."""
    there = importlib.util.find_spec("bitsandbytes") is not None
    install(session, "bitsandbytes")
    try:
        pytest(session, "tests/train/test_moments.py", "-m", "")
    finally:
        if not there:  # where it is installed, peft imports it, which costs every start two seconds
            session.run(sys.executable, "-m", "pip", "uninstall", "--yes", "bitsandbytes")


@nox.session(tags=["more"])
def docs(session: nox.Session) -> None:
    """The documentation: its notebook runs, no link is dead, no page is lost; build/pages has its sources."""
    install(session, *extra(ROOT / "pyproject.toml", "docs"))
    python, there = sys.executable, Path(session.create_tmp()).resolve()
    session.run(python, "tools/site_pages.py")
    notebook, shown = there / "notebook" / "quickstart.ipynb", ROOT / "build" / "pages" / "docs" / "quickstart.ipynb"
    shutil.rmtree(notebook.parent, ignore_errors=True)
    notebook.parent.mkdir()
    session.run(python, "-m", "jupytext", "--to", "ipynb", "--output", str(notebook), "docs/quickstart.md")
    session.run(python, "-m", "jupyter", "execute", "--inplace", str(notebook))
    shutil.copyfile(notebook, shown)
    quiet = {"NO_MKDOCS_2_WARNING": "1"}
    session.run(python, "-m", "mkdocs", "build", "--strict", "--site-dir", str(there / "site"), env=quiet)


@nox.session(tags=["more"])
def trackers(session: nox.Session) -> None:
    """Tracker `accelerate` with W&B, Trackio and MLflow themselves, offline; this environment keeps nothing of them."""
    folder = str(Path(session.create_tmp()).resolve() / "packages")  # tests work in folders of their own
    install(session, "--no-deps", "--upgrade", "--target", folder, "-r", "requirements/trackers.txt")
    pytest(session, "tests/runs/test_tracking_services.py", "-m", "", env={"PYTHONPATH": folder})


@nox.session(default=False)
def slurm(session: nox.Session) -> None:
    """Jobs of a real Slurm of two nodes, from Debian's packages in a temporary folder: 4 minutes."""
    session.run(sys.executable, "tools/slurm_here.py", session.create_tmp(), *slow_tests("test_slurm_jobs.py"))


@nox.session(default=False)
def ray(session: nox.Session) -> None:
    """Jobs of a real Ray: a head and two nodes on this machine, one of which is lost; 3 minutes."""
    folder = str(Path(session.create_tmp()).resolve() / "packages")  # tests work in folders of their own
    install(session, "--upgrade", "--target", folder, *extra(ROOT / "pyproject.toml", "ray"))
    session.run(*slow_tests("test_ray_jobs.py"), env={"PYTHONPATH": os.pathsep.join([str(ROOT), folder])})


@nox.session(default=False)
def gpu(session: nox.Session) -> None:
    """What only a GPU can show, in 9 minutes; arguments after -- go to tools/gpu.py, such as --dry without one."""
    session.run(sys.executable, "tools/gpu.py", *session.posargs)


@nox.session(default=False, venv_backend="venv")
def minimums(session: nox.Session) -> None:
    """The whole test suite on the oldest direct dependencies that pyproject.toml allows, in its own environment."""
    session.install("-e", ".[dev]", *oldest_dependencies(ROOT / "pyproject.toml"))
    session.run("pytest", "-m", "not faults", *session.posargs)


def pytest(session: nox.Session, *arguments: str, env: dict[str, str | None] | None = None) -> None:
    """Runs pytest in this environment."""
    session.run(sys.executable, "-m", "pytest", *arguments, env=env)


def slow_tests(name: str) -> list[str]:
    """The command that runs a file of the tests of clusters, one test after another."""
    return [sys.executable, "-m", "pytest", "-n0", "-m", "", f"tests/clusters/{name}"]


def install(session: nox.Session, *arguments: str) -> None:
    """Installs into this environment, at the versions of constraints.txt."""
    session.run(sys.executable, "-m", "pip", "install", *arguments, env=PINNED)


def extra(path: Path, name: str) -> list[str]:
    """The requirements of an extra."""
    found: list[str] = tomllib.loads(path.read_text(encoding="utf-8"))["project"]["optional-dependencies"][name]
    return found


def oldest_dependencies(path: Path) -> list[str]:
    """`name==version` of every direct dependency's lower bound."""
    project = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
    matches = [LOWER_BOUND.match(requirement) for requirement in project["dependencies"]]
    assert all(matches), "every dependency in pyproject.toml has a lower bound"
    return [f"{match['name']}=={match['version']}" for match in matches if match]
