"""Files that extend others: each laid over the one it names, however many there are; arms that one drops."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from aegpo.config.marks import Mark, Marked, Mistake, merge, refuse
from aegpo.config.parsing import parse
from aegpo.config.shipped import shipped_files
from aegpo.core import texts
from aegpo.errors import SpecError


@dataclass(frozen=True)
class Extended:
    """A document with the files it extends below it, less what was measured of those."""

    document: Marked
    dropped: dict[str, Mark]  # each arm that a file drops with ``arms: {NAME: null}``, and where
    cautions: tuple[Mistake, ...]  # which files are not where they were looked for first


def read_extended(path: Path, mistakes: list[Mistake], text: str | None = None) -> Extended:
    """A file and all that it extends.

    Args:
        path: of the file.
        mistakes: gets what is wrong, also in the files below.
        text: what is read in place of the file, which need not be there.

    Raises:
        SpecError: if a file cannot be read.
    """
    chain = [path]
    documents = [_read(path, mistakes) if text is None else _parsed(text, path, mistakes)]
    dropped, cautions = dict[str, Mark](), list[Mistake]()
    while (below := _below(chain, documents[-1], mistakes, cautions)) is not None:
        chain.append(below)
        documents.append(_read(below, mistakes))
    document = documents.pop()
    while documents:
        document = lay_over(document.without("measured"), documents.pop(), dropped)
    return Extended(document.without("extends"), dropped, tuple(cautions))


def lay_over(base: Marked, patch: Marked, dropped: dict[str, Mark], *, indexed: bool = False) -> Marked:
    """`base` with `patch` laid over it as `merge` does, less the arms of `base` that are null in the patch.

    Args:
        base: a document.
        patch: what changes of it; an arm that is null here and not in `base` stays, for whoever reads the arms.
        dropped: gets each arm that is dropped, and where; one that the patch defines is none of them any more.
        indexed: as for `merge`.
    """
    arms, changed = _arms(base), _arms(patch)
    gone = [name for name, arm in changed.items() if arm.value is None and name in arms]
    for name in changed:
        dropped.pop(name, None)
    dropped |= {name: changed[name].key for name in gone}
    merged = merge(base, patch, indexed=indexed)
    if not gone:
        return merged
    return replace(merged, value={**merged.children, "arms": merged.children["arms"].without(*gone)})


def _arms(document: Marked) -> Mapping[str, Marked]:
    return document.children["arms"].children if "arms" in document.children else {}


def _below(chain: list[Path], document: Marked, mistakes: list[Mistake], cautions: list[Mistake]) -> Path | None:
    """The file that the last one of a chain extends; None: it extends none, or that is a mistake."""
    extends = document.children.get("extends")
    if extends is None:
        return None
    wrong = "must be the path of a file, relative to this one"
    if isinstance(extends.value, str):
        below = chain[-1].parent / extends.value
        wrong = f"no file {str(below)!r}; paths are relative to this file"
        if not below.exists() and (shipped := shipped_files().get(extends.value.removesuffix(".yaml"))) is not None:
            what = f"no file {str(below)!r}, so this is the one that comes with aegpo, {shipped}"
            cautions.append(Mistake(extends.mark, "extends", what))
            below = shipped
        if below.is_file():
            known = [each.resolve() for each in chain]
            if below.resolve() not in known:
                return below
            circle = [*chain[known.index(below.resolve()) :], below]
            wrong = f"files extend one another in a circle: {' extends '.join(map(str, circle))}; take one out"
    mistakes.append(Mistake(extends.mark, "extends", wrong))
    return None


def _read(path: Path, mistakes: list[Mistake]) -> Marked:
    try:
        text = texts.utf8(path.read_bytes())
    except texts.NotTextError as error:
        refuse([Mistake(Mark(str(path), error.line, error.column, error.row), "", error.message)])
        raise
    except OSError as error:
        raise SpecError(f"{path}: cannot be read: {error.strerror}; give the path of an experiment file") from error
    return _parsed(text, path, mistakes)


def _parsed(text: str, path: Path, mistakes: list[Mistake]) -> Marked:
    document, found = parse(text, str(path))
    mistakes += found
    if document is not None and isinstance(document.value, Mapping):
        return document
    start = Mark(str(path), 1, 1, next(iter(text.splitlines()), ""))
    if not found:
        what = "the file is empty" if document is None else "not a mapping"
        mistakes.append(
            Mistake(start, "", f"{what}; an experiment is a mapping that starts with 'model', 'rewards', ...")
        )
    return Marked({}, start, start)
