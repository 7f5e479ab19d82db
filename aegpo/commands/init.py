"""Writes an experiment file to begin with: a commented one of two arms, or a copy of one that comes with aegpo."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from aegpo.config.loading import ARM_NAME
from aegpo.config.shipped import Copy, about, copies, shipped_files, shipped_instead
from aegpo.core.files import write_atomically
from aegpo.core.registry import LONGEST_NAME
from aegpo.errors import AegpoError

FIRST = "first"  # the name of an experiment that gets none


@dataclass(frozen=True)
class InitRequest:
    """What the command line asked for."""

    name: str | None = None  # None: that of the shipped file, or `FIRST`
    source: str | None = None  # of the shipped ones; None: the one with two arms


def init(request: InitRequest) -> list[Path]:
    """Writes the files, none over one that is there and differs; the experiment's own comes first.

    Raises:
        AegpoError: if the name can be no file's, a file is there already, or the folder cannot be written to.
    """
    name = request.name or request.source or FIRST
    if not ARM_NAME.fullmatch(name) or len(name) > LONGEST_NAME or name.endswith(".yaml"):
        stem = name.removesuffix(".yaml")
        way = f"; leave '.yaml' out: {stem}" if stem != name else ""
        raise AegpoError(
            f"{name!r} cannot be the name of an experiment: at most {LONGEST_NAME} letters, digits, '.', '_' and '-', "
            f"the first a letter or digit{way}"
        )
    wanted = [_first(name)] if request.source is None else copies(request.source, name)
    written = [Path(each.name) for each in wanted]
    for path, each in zip(written, wanted, strict=True):
        if path.exists() and (path == written[0] or not path.is_file() or path.read_bytes() != each.text.encode()):
            raise AegpoError(f"{path} is there already; give another name, or move it")
    try:
        for path, each in zip(written, wanted, strict=True):
            write_atomically(path, each.text.encode())
    except OSError as error:
        raise AegpoError(f"{Path.cwd()} cannot be written to: {error.strerror}; go to another folder") from error
    return written


def listed() -> str:
    """The shipped experiments, a line each."""
    files = shipped_files()
    width = max(map(len, files), default=0)
    return "\n".join(f"{name:<{width}}  {about(path)}" for name, path in files.items())


def at_hand(path: Path) -> Path:
    """The path, or the shipped file that it means where nothing is there, which is said."""
    instead = shipped_instead(path)
    if instead is None:
        return path
    print(
        f"note: there is no {path} here; this is the one that comes with aegpo, {instead} ('aegpo init --from "
        f"{instead.stem}' copies it)",
        file=sys.stderr,
    )
    return instead


def _first(name: str) -> Copy:
    text = (Path(__file__).parent / "first.yaml").read_text(encoding="utf-8")
    return Copy(f"{name}.yaml", text.replace("NAME", name))
