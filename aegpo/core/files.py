"""Files and folders that are whole or absent at any moment, whatever happens while they are written."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from aegpo.core.as_json import dumps
from aegpo.errors import AegpoError

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # of a disk that takes no more
REFUSED = (*NO_ROOM, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP, errno.EIO, errno.EMFILE, errno.ENFILE)
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)  # of a disk that syncs files, but no folders
_SYNCED = "r+b" if os.name == "nt" else "rb"  # how a file is opened to be synced


def refused(error: OSError, folder: Path | None = None) -> bool:
    """True if a disk, or the rights there, refuse what a command does; or if what is below `folder` was taken away."""
    if error.errno == errno.ENOENT and folder is not None and isinstance(error.filename, str):
        return Path(error.filename).is_relative_to(folder)
    return error.errno in REFUSED


def way_out(error: OSError) -> str:
    """What the user of a folder that is refused can do, for the end of a message."""
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "have it made writable, or choose another folder"
    if error.errno == errno.ENAMETOOLONG:
        return "choose shorter names"
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return "allow more open files, as with 'ulimit -n'"
    return "make room" if error.errno in NO_ROOM else "see what became of it"


# --- files -----------------------------------------------------------------------------------------------------------


def write_json(path: Path, value: Any) -> None:
    """Writes JSON so that the file is whole or absent at any moment."""
    write_atomically(path, (dumps(value, indent=1) + "\n").encode())


def write_atomically(path: Path, content: bytes) -> None:
    """Replaces a file in one step, safe against a crash at any moment."""
    temporary = _beside(path)
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def append(path: Path, content: bytes) -> None:
    """Adds to the end of a file, which is made if need be; it is on disk when this returns."""
    new = not path.exists()
    with path.open("ab") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    if new:
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Waits until names that were added to or removed from a folder are on disk, where the disk can say so."""
    if os.name == "nt":  # which opens no folders
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(descriptor)


def sync_all(folder: Path) -> None:
    """Waits until a folder is on disk, with all that is below it."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open(_SYNCED) as file:
                os.fsync(file.fileno())
        elif path.is_dir():
            sync_folder(path)
    sync_folder(folder)


def share(folder: Path) -> None:
    """Gives the files of a folder that was just made its rights to read and write, which are those the umask leaves.

    safetensors writes for the owner alone, so that others who may read a folder could not read its weights.
    """
    rights = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(rights)


# --- folders ---------------------------------------------------------------------------------------------------------


@contextmanager
def whole_folder(out: Path, option: str = "--out", replaces: Sequence[str] = ()) -> Iterator[Path]:
    """A folder to write into that becomes `out` at the end, and is removed if anything fails before.

    Whether `out` can be made is found out on entry, before the work that is done inside.

    Args:
        out: the folder that is wanted. It may be there if it is empty.
        option: the option that names it, for messages.
        replaces: patterns of the names that an earlier call left in it; if it has nothing else it is replaced.

    Raises:
        AegpoError: if it cannot be made, on entry; if the disk is full; or if it cannot be put in place at the end:
            then what was made is kept, and the message says where.
    """
    made = _try_folder(out, option, replaces)
    temporary = _beside(out)
    try:
        temporary.mkdir()
        yield temporary
        share(temporary)
        sync_all(temporary)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        _remove_empty(made)
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            raise AegpoError(
                f"{option} {out}: cannot be written to: {error.strerror}; nothing was kept: make room, or choose "
                "another folder"
            ) from error
        raise
    _put_in_place(temporary, out, replaces)


def open_folder(folder: Path, option: str = "--out", files: Sequence[str] = ()) -> Path:
    """A folder that files are put into one by one, beside what it holds; made if need be.

    Args:
        folder: the folder.
        option: the option that names it, for messages.
        files: names of files that will be written or replaced there.

    Raises:
        AegpoError: if it cannot be made, nothing can be put into it, or a folder has the name of a file.
    """
    try:
        for name in files:
            if (folder / name).is_dir():
                raise AegpoError(f"{option} {folder / name}: is a folder where a file goes; move it, or choose another")
        folder.mkdir(parents=True, exist_ok=True)
        trial = _beside(folder / "trial")
        trial.mkdir()
        trial.rmdir()
    except OSError as error:
        raise _cannot(folder, option, error) from error
    return folder


def _try_folder(out: Path, option: str, replaces: Sequence[str]) -> list[Path]:
    """Makes `out` and takes it away again; the folders above it that had to be made stay, and are returned."""
    made: list[Path] = []
    try:
        there = _there(out, option, replaces)
        made = [each for each in out.parents if not each.exists()]
        out.parent.mkdir(parents=True, exist_ok=True)
        trial = _beside(out)
        trial.mkdir()
        try:
            if not there or not any(out.iterdir()):
                trial.replace(out)  # what will be done in the end
            if not there:
                out.rmdir()
        finally:
            with suppress(FileNotFoundError):
                trial.rmdir()
    except OSError as error:
        _remove_empty(made)
        raise _cannot(out, option, error) from error
    return made


def _there(out: Path, option: str, replaces: Sequence[str]) -> bool:
    """Whether there is an `out` that may be replaced.

    Raises:
        AegpoError: if what is there may not.
    """
    if out.is_symlink():
        raise AegpoError(f"{option} {out}: is a link, to {out.readlink()}; give the folder itself, or another one")
    if not out.exists():
        return False
    if not out.is_dir():
        raise AegpoError(f"{option} {out}: is a file, and nothing is overwritten; choose another folder, or remove it")
    if Path.cwd().is_relative_to(out.resolve()):
        raise AegpoError(f"{option} {out}: is where you are, and cannot be replaced; give a folder of its own")
    if os.path.ismount(out):
        raise AegpoError(f"{option} {out}: is a mount point, and cannot be replaced; give a folder below it")
    strangers = _strangers(out, replaces)
    if strangers:
        whose = f" and has what this command did not write, such as {strangers[0].name!r}" if replaces else ""
        raise AegpoError(
            f"{option} {out}: is there already{whose}, and nothing is overwritten; choose another folder, or remove it"
        )
    return True


def _strangers(out: Path, replaces: Sequence[str]) -> list[Path]:
    """What is in a folder beside the names that may be replaced."""
    return [path for path in sorted(out.iterdir()) if not any(path.match(pattern) for pattern in replaces)]


def _put_in_place(temporary: Path, out: Path, replaces: Sequence[str]) -> None:
    """The last step: `temporary` becomes `out`.

    Raises:
        AegpoError: if it cannot; `temporary` stays.
    """
    try:
        if out.is_dir() and any(out.iterdir()) and not _strangers(out, replaces):
            # A folder cannot be replaced in one step; if the second of two fails, the first is undone.
            before = out.rename(_beside(out))
            try:
                temporary.rename(out)
            except OSError:
                before.rename(out)
                raise
            shutil.rmtree(before, ignore_errors=True)
        else:
            temporary.rename(out)
        sync_folder(out.parent)
    except OSError as error:
        raise AegpoError(
            f"{out} was made but cannot be put in place: {error.strerror}; it is kept in {temporary}: move it yourself"
        ) from error


def _cannot(out: Path, option: str, error: OSError) -> AegpoError:
    why = f"{error.filename} is a file" if isinstance(error, FileExistsError) else error.strerror
    return AegpoError(f"{option} {out}: cannot be written to: {why}; choose another folder")


def _remove_empty(folders: Sequence[Path]) -> None:
    """Takes back folders that were made on the way, the lowest first."""
    for each in folders:
        with suppress(OSError):
            each.rmdir()


def _beside(path: Path) -> Path:
    """A name of its own in the same folder; it is short, so that it fits wherever `path` does."""
    return path.with_name(f".aegpo-{secrets.token_hex(6)}.tmp")
