"""The experiment files that come with aegpo: found wherever it is installed, and copied for who wants to change one.

A wheel has them inside the package; a checkout has them beside it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from aegpo.core.registry import suggestion
from aegpo.errors import AegpoError

FOLDER = "experiments"
_EXTENDS = re.compile(r"^extends:\s*(\S+\.yaml)\s*$", re.MULTILINE)
_MEASURED = re.compile(r"^measured:.*\n(?:[ \t].*\n|\n(?=[ \t]))*", re.MULTILINE)
_NAME = re.compile(r"^name:\s*\S+", re.MULTILINE)


@dataclass(frozen=True)
class Copy:
    """A file of one's own that begins as a shipped one."""

    name: str  # of the file
    text: str


def shipped_files() -> Mapping[str, Path]:
    """The shipped files by their names without the ending; empty if an installation has none."""
    package = Path(__file__).parents[1]
    folder = next((each for each in (package / FOLDER, package.parent / FOLDER) if each.is_dir()), None)
    return {} if folder is None else {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def shipped_instead(path: Path) -> Path | None:
    """The shipped file that a path means which is not there: `experiments/NAME.yaml`, or a bare `NAME`; else None.

    A path to anywhere else, or to a file NAME.yaml, is a file of the user's that is missing.
    """
    if path.exists():
        return None
    name = path.stem if path == Path(FOLDER) / f"{path.stem}.yaml" else str(path)
    return shipped_files().get(name)


def about(path: Path) -> str:
    """What a shipped file says it is, without its own name: the first sentence of its first comment."""
    lines = [line.removeprefix("#").strip() for line in path.read_text(encoding="utf-8").splitlines()[:3]]
    sentence = re.split(r"(?<=[.?]) ", " ".join(lines))[0]
    return re.sub(r"^[^:]{1,40}: ", "", sentence).removesuffix(".")


def copies(source: str, name: str) -> list[Copy]:
    """A shipped file under another name, less what was measured of it, and those that it extends, as they are.

    Args:
        source: a key of `shipped_files`.
        name: of the experiment, and of its file.

    Raises:
        AegpoError: if no file is called so, or the copy would have the name of one that it extends.
    """
    files = shipped_files()
    if source not in files:
        raise AegpoError(f"no experiment that comes with aegpo is called {source!r}; {suggestion(source, files)}")
    text = files[source].read_text(encoding="utf-8")
    below = list[Copy]()
    extended = _EXTENDS.search(text)
    while extended is not None:
        path = files[source].parent / extended[1]
        below.append(Copy(path.name, path.read_text(encoding="utf-8")))
        extended = _EXTENDS.search(below[-1].text)
    if f"{name}.yaml" in [each.name for each in below]:
        raise AegpoError(f"{source!r} extends {name}.yaml, which comes along; choose another name")
    own = _MEASURED.sub("", _NAME.sub(f"name: {name}", text, count=1))
    return [Copy(f"{name}.yaml", own), *below]
