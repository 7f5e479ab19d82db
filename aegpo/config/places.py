"""Places in experiment files: seen from the file that names them; those of an option, from the working directory.

Texts are written out from the root here, so that an experiment means the same wherever its run is opened from.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from aegpo.config.marks import OPTION, Mark, Marked, Mistake, dotted
from aegpo.core.places import NamedPlace, absolute, is_there, named_places, same_file
from aegpo.core.problems import Location
from aegpo.core.registry import Spec

SINCE = "paths in a file are relative to that file since 0.2"


def written_out(spec: type[Spec], tree: Marked, mistakes: list[Mistake]) -> Marked:
    """The document of an arm with its places from the root on; repositories of the hub stay as they are."""
    for place in named_places(spec, tree.plain):
        node, _ = tree.find(place.location)
        try:
            tree = _put(tree, place.location, _from_root(place, node.mark))
        except ValueError as error:
            mistakes.append(Mistake(node.mark, dotted(place.location), str(error)))
    return tree


def _from_root(place: NamedPlace, mark: Mark) -> str:
    """What a text means.

    Raises:
        ValueError: if it would find another file than before there was this rule, or begins with nobody's home.
    """
    text = place.text
    if Path(text).is_absolute() or text.startswith("~"):
        return str(absolute(text, Path()))
    if mark.name == OPTION:
        return _of_option(place)
    folder = Path(mark.name).parent.absolute()
    found = absolute(text, folder)
    if (before := _here(text)) is not None and not same_file(before, found):
        raise ValueError(_moved(text, folder, found, before))
    return str(found) if place.only_local or is_there(found) else text


def _of_option(place: NamedPlace) -> str:
    if _here(place.text) is None and not place.only_local:
        return place.text
    try:
        return str(absolute(place.text, Path.cwd()))
    except OSError as error:
        what = f"{place.text!r} is relative to the working directory, which is gone; go to another, or write it out"
        raise ValueError(what) from error


def _here(text: str) -> Path | None:
    """What the working directory has of that name."""
    try:
        here = Path.cwd() / text
    except OSError:
        return None
    return here if is_there(here) else None


def _moved(text: str, folder: Path, found: Path, before: Path) -> str:
    """What to write for a text that meant one thing and now means another."""
    old = _unmistakable(os.path.relpath(before, folder), before)
    if not is_there(found):
        return f"there is no {str(found)!r}, and {SINCE}; the working directory has {text!r}: write {old!r}"
    new = _unmistakable(str(Path(os.pardir) / folder.name / text), found)
    return f"is {str(found)!r}, for {SINCE}; the working directory has another {text!r}: write {new!r} or {old!r}"


def _unmistakable(text: str, place: Path) -> str:
    """A text for a place, unless the working directory has something of that name too; then the place itself."""
    return text if _here(text) is None else str(place)


def _put(tree: Marked, location: Location, text: str) -> Marked:
    """The tree with another text at a place that is there."""
    if not location:
        return replace(tree, value=text)
    head, *rest = location
    if isinstance(tree.value, tuple):
        assert isinstance(head, int), "items of a list are counted"
        items = [_put(item, tuple(rest), text) if index == head else item for index, item in enumerate(tree.value)]
        return replace(tree, value=tuple(items))
    return replace(tree, value={**tree.children, str(head): _put(tree.children[str(head)], tuple(rest), text)})
