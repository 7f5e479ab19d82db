"""Places in manifests: from the root on, so that a run opens from any folder; those of versions before 0.2 are not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aegpo.core.places import NamedPlace, absolute, is_there, named_places, same_file
from aegpo.core.problems import Location
from aegpo.core.registry import Spec
from aegpo.errors import CheckpointError

KEY = "places"  # of a manifest whose places are written out
FROM_ROOT = "from the root"


def read_places(folder: Path, manifest: Mapping[str, Any], spec: type[Spec], data: dict[str, Any]) -> dict[str, Any]:
    """The experiment of a manifest with its places from the root on; an older one's are seen from where we are.

    Args:
        folder: of the run.
        manifest: its manifest.
        spec: the type of its experiment.
        data: its experiment, under the keys of today; changed in place.

    Raises:
        CheckpointError: if a text that means a folder would be taken for a repository of the hub from here, or one
            that means a repository for a folder.
    """
    written = manifest.get(KEY) == FROM_ROOT
    for place in list(named_places(spec, data)):
        if Path(place.text).is_absolute():
            continue
        here = is_there(Path(place.text))
        if written and place.hub and here:
            raise CheckpointError(
                f"{_said(folder, place)} a repository of the hub, and {Path.cwd()} has something of that name; give "
                "the command from another folder"
            )
        if not written and here:
            _put(data, place.location, str(absolute(place.text, Path.cwd())))
        elif not written and place.hub and (begun := _seen_from(folder, place.text)) is not None:
            raise CheckpointError(
                f"{_said(folder, place)} seen from the folder the run was begun in, by a version that did not note "
                f"which; {begun} has it: give the command from there"
            )
    return data


def same_place(before: object, now: object, manifest: Mapping[str, Any]) -> bool:
    """True if a text in a manifest and one of a file are one place: by another way, or seen from a folder not noted."""
    if not isinstance(before, str) or not isinstance(now, str):
        return False
    old, new = Path(before), Path(now)
    if not old.is_absolute() and new.is_absolute() and manifest.get(KEY) != FROM_ROOT:
        parts = tuple(part for part in old.parts if part != "..")
        return parts != () and new.parts[-len(parts) :] == parts
    return same_file(old, new)


def moved(before: object, now: object) -> bool:
    """True if what a manifest names is gone, and a file has one of that name elsewhere: the folder around was moved."""
    if not isinstance(before, str) or not isinstance(now, str):
        return False
    old, new = Path(before), Path(now)
    return old.is_absolute() and old.name == new.name and not is_there(old) and is_there(new)


def _said(folder: Path, place: NamedPlace) -> str:
    key = ".".join(str(part) for part in place.location)
    return f"{folder}: its {key} is {place.text!r},"


def _seen_from(folder: Path, text: str) -> Path | None:
    """The folder above a run that has something of a name."""
    return next((each for each in folder.resolve().parents if is_there(each / text)), None)


def _put(data: Any, location: Location, text: str) -> None:
    *way, last = location
    for part in way:
        data = data[part]
    data[last] = text
