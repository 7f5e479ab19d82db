"""Checkpoints: the whole state of a run in safetensors and JSON, written so that a crash cannot leave half of one.

    checkpoints/step-000010/
        policy.safetensors     one file for each prefix of the tensors' names: policy, ema, optimizer, rng, part
        shards/                sharded tensors, in files of each process, see aegpo.runs.sharded_files
        state.json             everything that is not a tensor, and which run it is of
        checksums.json         SHA-256 of the files above, written last

A checkpoint is written into a hidden folder beside and renamed when all of it is on disk. Nothing is pickled, so a
checkpoint from a stranger cannot run code.
"""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aegpo.core.as_json import dumps
from aegpo.core.files import share, sync_all, sync_folder
from aegpo.errors import CheckpointError, DiskError
from aegpo.runs.checkpoint_files import CHECKSUMS, FORMAT, NAME, STATE, Stored, check_run, checked, read_state
from aegpo.runs.sharded_files import checksum

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after `step` training steps."""

    step: int
    tensors: dict[str, Tensor]  # policy/..., ema/..., optimizer/..., rng/..., part/<axis>/...
    state: dict[str, Any]  # JSON: dict, list, str, int, float, bool, None
    run: Mapping[str, Any] | None = None  # what tells its run from others, as JSON; before 0.2 it was not noted
    records: Mapping[str, Any] | None = None  # what the run had recorded, see `resuming.counted`; nor was that
    stored: Stored | None = None  # the tensors, if they are read later; then there are none above


def save(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Writes a checkpoint below `folder` and then deletes all but the newest `keep`; one process writes a folder.

    Checkpoints of later steps are of a future that was given up (they were damaged, or the run would have started
    from them), so they are deleted too.

    Returns:
        The checkpoint's own folder.

    Raises:
        CheckpointError: if a tensor cannot be stored, or the folder cannot be written to, as on a full disk; the
            checkpoints that were there stay.
    """
    with on_disk(folder, checkpoint.step):
        hidden = made_hidden(folder, checkpoint.step)
        write_tensors(hidden, checkpoint)
        return finish(folder, checkpoint, keep, {})


@contextmanager
def on_disk(folder: Path, step: int) -> Iterator[None]:
    """Inside, a checkpoint is written below `folder`; if the disk refuses, nothing of it stays.

    Raises:
        DiskError: if the disk refuses.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors tells a full disk by its own error
        shutil.rmtree(_hidden(folder, step), ignore_errors=True)
        there = ", ".join(map(str, steps_in(folder))) or "none"
        raise DiskError(
            f"the checkpoint of step {step} cannot be written to {folder}: {error}; checkpoints that are there: "
            f"{there}; make room or mend the disk, then give the same command again"
        ) from error


def made_hidden(folder: Path, step: int) -> Path:
    """The empty folder that a checkpoint is written into; those that were left by writers that died are removed."""
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in (*folder.glob(".step-*.tmp"), *folder.glob(".replaced-step-*.tmp")):
        _remove(leftover)
    hidden = _hidden(folder, step)
    hidden.mkdir()
    return hidden


def finish(folder: Path, checkpoint: Checkpoint, keep: int, sums: Mapping[str, str]) -> Path:
    """Puts a checkpoint in place whose tensors are in its hidden folder, and deletes those that are not kept.

    Args:
        folder: what `save` got.
        checkpoint: of which only what is no tensor matters.
        keep: how many stay.
        sums: SHA-256 of the files that others wrote, by their names in the checkpoint.

    Raises:
        CheckpointError: if there is a file in its place.
    """
    hidden = _hidden(folder, checkpoint.step)
    _seal(hidden, checkpoint, sums)
    final = folder / f"step-{checkpoint.step:06d}"
    if final.exists() and not final.is_dir():
        shutil.rmtree(hidden)
        raise CheckpointError(
            f"{final} is a file where the checkpoint of step {checkpoint.step} goes; move it, then give the same "
            "command again"
        )
    if final.exists():
        # A folder cannot be replaced in one step; until the new one is in place, load_latest finds the old one here.
        final.rename(_cleared(folder / f".replaced-{final.name}"))
    hidden.rename(final)
    sync_folder(folder)
    _prune(folder, checkpoint.step, keep)
    return final


def _hidden(folder: Path, step: int) -> Path:
    return folder / f".step-{step:06d}.tmp"


def load_latest(
    folder: Path,
    device: torch.device | str = "cpu",
    report: Callable[[str], None] | None = None,
    run: Mapping[str, Any] | None = None,
    later: bool = False,
) -> Checkpoint | None:
    """The newest intact checkpoint below `folder`, or None if none was ever written.

    Args:
        folder: what `save` got.
        device: where the tensors go.
        report: gets a line for each damaged checkpoint that is passed over; default: `warnings.warn`.
        run: what tells the run from others; a checkpoint of another one is as good as damaged.
        later: its tensors are checked, and read later, see `Checkpoint.stored`.

    Raises:
        CheckpointError: if there are checkpoints and every one is damaged, or `folder` is none.
    """
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file where a folder goes; move it, or start the run over with --fresh")
    damages: list[str] = []
    for _, path in _checkpoints(folder):
        try:
            return _load(path, device, run, later=later)
        except CheckpointError as damage:
            damages.append(f"{path.name}: {damage}")
            message = f"a checkpoint is damaged and passed over: {path}: {damage}"
            warnings.warn(message, stacklevel=2) if report is None else report(message)
    if damages:
        lines = "\n".join(f"  {damage}" for damage in damages)
        raise CheckpointError(
            f"every checkpoint in {folder} is damaged:\n{lines}\n"
            "put back an intact one, or start the run over with --fresh"
        )
    return None


def steps_in(folder: Path) -> tuple[int, ...]:
    """The training steps of the checkpoints below `folder`, ascending; some may be damaged."""
    return tuple(sorted({step for step, path in _checkpoints(folder) if not path.name.startswith(".")}))


def noted_records(folder: Path) -> Mapping[str, Any]:
    """What the newest checkpoint below `folder` notes of the run's records; nothing if it notes none, or is damaged."""
    for _, path in _checkpoints(folder)[:1]:
        try:
            checked(path, [STATE])
            return read_state(path).get("records") or {}
        except CheckpointError:
            return {}  # no record of results: it is told when a run goes on from it, or its weights are asked for
    return {}


def load_step(
    folder: Path,
    step: int,
    device: torch.device | str = "cpu",
    prefixes: Sequence[str] | None = None,
    run: Mapping[str, Any] | None = None,
    later: bool = False,
) -> Checkpoint:
    """The checkpoint of one training step.

    Args:
        folder: what `save` got.
        step: of the checkpoint.
        device: where the tensors go.
        prefixes: of the tensors that are read, such as "policy"; None: all of them.
        run: what tells the run from others; None: it may be of any.
        later: its tensors are checked, and read later, see `Checkpoint.stored`.

    Raises:
        CheckpointError: if there is none, it is damaged or of another run; the message names those there are.
    """
    path, known = folder / f"step-{step:06d}", steps_in(folder)
    if step not in known:
        there = ", ".join(map(str, known)) or "none"
        raise CheckpointError(f"no checkpoint of step {step} in {folder}; those there are: {there}")
    try:
        return _load(path, device, run, prefixes, later)
    except CheckpointError as error:
        others = ", ".join(str(each) for each in known if each != step) or "none"
        raise CheckpointError(f"{path} is damaged: {error}; other checkpoints: {others}") from error


def write_tensors(target: Path, checkpoint: Checkpoint) -> None:
    """Puts the whole tensors of a checkpoint into its folder; those that are stored already are copied.

    Raises:
        CheckpointError: if a tensor cannot be stored.
    """
    from safetensors.torch import save_file

    if checkpoint.stored is not None:
        checkpoint.stored.copy_to(target)
    for prefix, tensors in _by_prefix(checkpoint.tensors).items():
        save_file(tensors, target / f"{prefix}.safetensors")


def _seal(target: Path, checkpoint: Checkpoint, sums: Mapping[str, str]) -> None:
    """Writes what a checkpoint is beside its tensors, and last what tells whether all of it is there."""
    there = {path.relative_to(target).as_posix(): path for path in target.rglob("*") if path.is_file()}
    state = {"format": FORMAT, "step": checkpoint.step, "state": checkpoint.state, "files": sorted({*there, *sums})}
    state |= {} if checkpoint.run is None else {"run": dict(checkpoint.run)}
    state |= {} if checkpoint.records is None else {"records": dict(checkpoint.records)}
    (target / STATE).write_text(dumps(state, indent=1))
    there[STATE] = target / STATE
    found = {name: sums[name] if name in sums else checksum(there[name]) for name in sorted({*there, *sums})}
    (target / CHECKSUMS).write_text(dumps({"format": FORMAT, "sha256": found}, indent=1))
    share(target)
    sync_all(target)


def _by_prefix(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    import torch

    groups: dict[str, dict[str, Tensor]] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        prefix = name.split("/", 1)[0]
        assert re.fullmatch(r"[a-z]+", prefix), f"tensor {name!r} has no prefix such as 'policy/'"
        if tensor.layout is not torch.strided:
            raise CheckpointError(f"tensor {name!r} has the layout {tensor.layout}; only dense tensors can be stored")
        plain = tensor.detach().cpu().contiguous()
        if plain.untyped_storage().data_ptr() in storages:  # tied weights: safetensors stores each name on its own
            plain = plain.clone()
        storages.add(plain.untyped_storage().data_ptr())
        groups.setdefault(prefix, {})[name] = plain
    return groups


def _load(
    path: Path,
    device: torch.device | str,
    run: Mapping[str, Any] | None,
    prefixes: Sequence[str] | None = None,
    later: bool = False,
) -> Checkpoint:
    """One checkpoint, after every byte of it was checked."""
    names = checked(path)
    content = read_state(path, names)
    check_run(content.get("run"), run)
    stored = Stored(path, names)
    tensors = {} if later else stored.read(prefixes, device)
    found = stored if later else None
    return Checkpoint(content["step"], tensors, content["state"], content.get("run"), content.get("records"), found)


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) newest first; of two of one step, the one in place before the one it was about to replace."""
    if not folder.is_dir():
        return []
    matches = [(match, path) for path in folder.iterdir() if (match := NAME.fullmatch(path.name)) and path.is_dir()]
    matches.sort(key=lambda pair: (-int(pair[0]["step"]), pair[0]["hidden"] is not None))
    return [(int(match["step"]), path) for match, path in matches]


def _prune(folder: Path, newest: int, keep: int) -> None:
    found = _checkpoints(folder)
    kept = [path for step, path in found if step <= newest and not path.name.startswith(".")][:keep]
    for _, path in found:
        if path not in kept:
            # Renamed first: a crash in the middle of deleting must not leave a damaged checkpoint in place.
            trash = _cleared(folder / f".{path.name.lstrip('.')}.old.tmp")
            path.rename(trash)
            shutil.rmtree(trash)


def _cleared(path: Path) -> Path:
    if path.exists():
        _remove(path)
    return path


def _remove(path: Path) -> None:
    """Removes a folder, or a stranger's file of its name."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
