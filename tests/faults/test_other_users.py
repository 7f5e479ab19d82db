"""Users without rights, homes or names, limits of processes, and machines without a shell's usual things."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from surroundings import NOBODY, Surroundings, as_user, root_only

RUN = Path("tiny", "main", "seed-0")


@pytest.fixture
def mine(surroundings: Surroundings, request) -> Path:
    """A folder that belongs to nobody, below the one that anybody may enter."""
    folder = surroundings.folder / f"of-nobody-{abs(hash(request.node.nodeid)):x}"
    folder.mkdir()
    os.chown(folder, NOBODY, NOBODY)
    return folder


@pytest.fixture(scope="module")
def unfinished(surroundings: Surroundings) -> Path:
    """OUT of a run that root began and did not finish."""
    out = surroundings.folder / "unfinished"
    shutil.copytree(surroundings.finished, out)
    (out / RUN / "finished.json").unlink()
    return out


HOMES: dict[str, dict[str, str | None]] = {
    "user nobody: own folder": {"HOME": "."},
    "user nobody: HOME unwritable": {"HOME": str(Path.home())},
    "user nobody: HOME missing": {"HOME": "/nonexistent"},
    "user without a name, HOME unset": {"HOME": None, "USER": None, "LOGNAME": None},
}


@root_only
@pytest.mark.parametrize("environment", HOMES.values(), ids=HOMES)
def test_another_user_runs_in_a_folder_of_its_own(surroundings: Surroundings, mine, environment):
    ended = surroundings.run(
        "run", surroundings.spec, "--out", mine / "runs", cwd=mine, before=as_user(NOBODY), environment=environment
    )
    surroundings.expect(ended, same=mine / "runs")


@root_only
def test_uid_that_nobody_has_home_unset(surroundings: Surroundings, mine):
    os.chown(mine, 54321, 54321)
    ended = surroundings.run(
        *("run", surroundings.spec, "--out", mine / "runs"),
        cwd=mine,
        before=as_user(54321),
        environment={"HOME": None},
    )
    surroundings.expect(ended, same=mine / "runs")


@root_only
@pytest.mark.parametrize("changes", [(), ("--set", "seeds=[0, 1]")], ids=["unfinished run", "several unfinished runs"])
def test_user_nobody_roots_unfinished_runs(surroundings: Surroundings, mine, unfinished, changes):
    ended = surroundings.run("run", surroundings.spec, "--out", unfinished, *changes, cwd=mine, before=as_user(NOBODY))
    surroundings.expect(ended, 2, words=["ermission"])


@root_only
def test_user_nobody_roots_runs(surroundings: Surroundings, mine):
    ended = surroundings.run("run", surroundings.spec, "--out", surroundings.finished, cwd=mine, before=as_user(NOBODY))
    surroundings.expect(ended, 0, 2)


@root_only
def test_user_nobody_roots_working_directory(surroundings: Surroundings):
    ended = surroundings.run("run", "spec.yaml", before=as_user(NOBODY))
    surroundings.expect(ended, 2, words=["ermission"])


@root_only
def test_user_nobody_sample_of_roots_run(surroundings: Surroundings, mine):
    """Stricter than it was, which took a refusal: who may read a run's folder may read its weights."""
    ended = surroundings.run(
        *("sample", surroundings.finished / RUN, "--prompt", "a red circle", "--out", mine / "s"),
        cwd=mine,
        before=as_user(NOBODY),
    )
    surroundings.expect(ended)


ENVIRONMENTS: dict[str, dict[str, str | None]] = {
    "HOME unset": {"HOME": None},
    "TMPDIR missing": {"TMPDIR": "/nonexistent/x"},
    "no git, no PATH": {"PATH": "/nonexistent"},
}


@pytest.mark.parametrize("environment", ENVIRONMENTS.values(), ids=ENVIRONMENTS)
def test_a_run_needs_none_of(surroundings: Surroundings, tmp_path, environment):
    ended = surroundings.run("run", "spec.yaml", "--out", tmp_path / "runs", environment=environment)
    surroundings.expect(ended, same=tmp_path / "runs")


def open_files(most: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


LIMITS: dict[str, tuple[tuple[int, ...], Callable[[], object]]] = {
    "umask 077": ((0,), lambda: os.umask(0o077)),
    "256 open files": ((0,), open_files(256)),
    "64 open files": ((0, 2), open_files(64)),
}


@pytest.mark.parametrize(("codes", "limit"), LIMITS.values(), ids=LIMITS)
def test_a_run_goes_on_under(surroundings: Surroundings, tmp_path, codes, limit):
    ended = surroundings.run("run", "spec.yaml", "--out", tmp_path / "runs", preexec_fn=limit)
    surroundings.expect(ended, *codes, same=tmp_path / "runs")


@root_only
def test_umask_777(surroundings: Surroundings, tmp_path):
    """Of root, for whom it changes nothing; anybody else makes folders that it may not enter."""
    ended = surroundings.run("run", "spec.yaml", "--out", tmp_path / "runs", preexec_fn=lambda: os.umask(0o777))
    surroundings.expect(ended, same=tmp_path / "runs")
