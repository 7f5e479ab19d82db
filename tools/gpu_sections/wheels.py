"""An environment on a machine without a network, from wheels that are carried along; imports nothing but `packaging`.

What is installed there and good enough stays, torch above all; only what is missing or too old is installed.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from email.parser import HeaderParser
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PYTHON, PLATFORMS = "3.12", ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014", "manylinux1")
EXTRA = ("ftfy>=6.3",)  # of reward hpsv2
STAYS = ("torch", "numpy", "scipy", "matplotlib")  # never carried: torch comes with numpy, reports alone read the rest
OPTIONAL = ("scipy", "matplotlib")  # no section imports them
INSIDE = "AEGPO_GPU_WHEELS"  # set in the environment that was made


@dataclass(frozen=True)
class Dist:
    """One distribution at hand: installed, or as a wheel."""

    version: str
    requires: tuple[str, ...]


@dataclass
class Plan:
    """What has to be done before the sections can run."""

    install: dict[str, str] = field(default_factory=dict)  # name -> version, from wheels
    missing: dict[str, str] = field(default_factory=dict)  # name -> what would do, and what there is


Find = Callable[[str], Dist | None]


def wanted() -> list[str]:
    """What aegpo needs, as pyproject.toml says, and what the sections need besides."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [*project["dependencies"], *EXTRA]


def planned(requirements: Iterable[str], installed: Find, wheels: Find, environment: dict[str, str]) -> Plan:
    """What to install of the wheels, and what neither the environment nor the wheels have.

    Args:
        requirements: as in a wheel's metadata.
        installed: by canonical name, what is installed.
        wheels: what is carried along.
        environment: of markers.
    """
    plan, ahead, seen = Plan(), list(requirements), set[str]()
    while ahead:
        text = ahead.pop()
        requirement = Requirement(text)
        if text in seen or (requirement.marker is not None and not requirement.marker.evaluate(environment)):
            continue
        seen.add(text)
        name = str(canonicalize_name(requirement.name))
        here, carried = installed(name), wheels(name)
        if here is not None and requirement.specifier.contains(here.version, prereleases=True):
            continue  # what is installed has what it needs
        if carried is not None and requirement.specifier.contains(carried.version, prereleases=True):
            plan.install[name] = carried.version
            ahead += carried.requires
            continue
        there = [f"{dist.version} {where}" for dist, where in ((here, "installed"), (carried, "carried")) if dist]
        plan.missing[name] = f"{requirement.specifier or 'any version'} ({', '.join(there) or 'not there'})"
    for name in OPTIONAL:
        plan.missing.pop(name, None)
    return plan


def installed(name: str) -> Dist | None:
    """A distribution of this environment."""
    try:
        found = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return None
    return Dist(found.version, tuple(found.requires or ()))


def read_wheels(folder: Path) -> dict[str, Dist]:
    """The wheels of a folder, by canonical name."""
    found: dict[str, Dist] = {}
    for path in sorted(folder.glob("*.whl")):
        with zipfile.ZipFile(path) as wheel:
            inside = next(name for name in wheel.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name))
            head = HeaderParser().parsestr(wheel.read(inside).decode())
        name = str(canonicalize_name(head["Name"]))
        if name in found:
            raise SystemExit(f"{folder} has two wheels of {name}; leave one")
        found[name] = Dist(head["Version"], tuple(head.get_all("Requires-Dist") or ()))
    return found


def markers(python: str | None = None) -> dict[str, str]:
    """The environment of markers: this one, or Linux on x86-64 with another Python."""
    here: dict[str, str] = {**{name: str(value) for name, value in default_environment().items()}, "extra": ""}
    if python is None:
        return here
    there = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux"}
    there |= {"platform_system": "Linux", "platform_machine": "x86_64", "os_name": "posix"}
    return here | there | {"platform_python_implementation": "CPython", "implementation_name": "cpython"}


# --- there -----------------------------------------------------------------------------------------------------------


def enter(folder: Path, words: Sequence[str]) -> None:
    """Runs this command again in an environment with what was missing; returns where nothing was, or in it.

    Raises:
        SystemExit: if the wheels lack something; the message says what.
    """
    carried = read_wheels(folder)
    plan = planned(wanted(), installed, carried.get, markers())
    if plan.missing:
        lacking = "; ".join(f"{name} {what}" for name, what in sorted(plan.missing.items()))
        raise SystemExit(f"{folder} lacks {lacking}; make it anew with --collect-wheels where there is a network")
    if not plan.install:
        return
    if os.environ.get(INSIDE):
        raise SystemExit(f"the environment still lacks {', '.join(sorted(plan.install))}; did pip fail?")
    place = Path(os.environ.get("TMPDIR", "/tmp")) / f"aegpo-gpu-{os.getuid()}-{os.getpid()}"
    python = made(place, folder, plan.install)
    print(f"installed for this run in {place}: {', '.join(f'{n} {v}' for n, v in sorted(plan.install.items()))}")
    os.environ[INSIDE] = str(place)
    sys.stdout.flush()
    os.execv(python, [str(python), *words])


def made(place: Path, folder: Path, install: dict[str, str]) -> Path:
    """A virtual environment that sees this one's packages below its own; its Python."""
    venv.EnvBuilder(system_site_packages=True, with_pip=False, symlinks=True).create(place)
    python = place / "bin" / "python"
    (own,) = (place / "lib").glob("python*/site-packages")
    # Of an environment made from within another one, Python shows the packages of the outermost one alone.
    below = [entry for entry in sys.path if Path(entry).is_dir() and not _is_ours(Path(entry))]
    (own / "below.pth").write_text("\n".join(below) + "\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    command += ["--ignore-installed", "--disable-pip-version-check", "--find-links", str(folder), "--target", str(own)]
    done = subprocess.run([*command, *(f"{name}=={version}" for name, version in install.items())], check=False)
    if done.returncode:
        raise SystemExit(f"pip could not install the wheels of {folder}; is there one for each, for this Python?")
    return python


def _is_ours(entry: Path) -> bool:
    """True for places that the environment has anyway: of Python itself, and of this repository."""
    library = Path(sysconfig.get_path("stdlib"))
    return entry in (library, library / "lib-dynload", ROOT, ROOT / "tools")


# --- beforehand ------------------------------------------------------------------------------------------------------


def collect(folder: Path) -> None:
    """Downloads what a machine with torch alone needs, at this environment's versions, for Python 3.12 on Linux."""
    plan = planned(wanted(), _stays, installed, markers(PYTHON))
    chosen = plan.install
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest"]
    command += [str(folder), "--python-version", PYTHON, "--implementation", "cp", "--disable-pip-version-check"]
    command += [word for name in PLATFORMS for word in ("--platform", f"{name}_x86_64")]
    failed = []
    for name, version in sorted(chosen.items()):
        if subprocess.run([*command, f"{name}=={version}"], check=False).returncode:
            failed.append(f"{name}=={version}")
    size = sum(path.stat().st_size for path in folder.glob("*.whl"))
    print(f"{len(chosen) - len(failed)} wheels, {size / 2**20:.1f} MiB, in {folder}; this repository comes on top")
    if failed:
        raise SystemExit(f"no wheel for Python {PYTHON} on Linux: {', '.join(failed)}")


def _stays(name: str) -> Dist | None:
    """A distribution that is there wherever this runs, in the version that is here."""
    return installed(name) if name in STAYS else None
