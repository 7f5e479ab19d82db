"""Folders that commands make: found out before any work whether they can be, then whole or absent."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from aegpo.core.files import open_folder, sync_all, whole_folder
from aegpo.errors import AegpoError


def make(out: Path, **options) -> None:
    with whole_folder(out, **options) as folder:
        (folder / "page.html").write_text("new")


def stopped_halfway(out: Path) -> None:
    with whole_folder(out) as folder:
        (folder / "half").write_text("x")
        raise KeyboardInterrupt


def outrun(out: Path, replaces: tuple[str, ...]) -> None:
    """Somebody else makes the folder while we work."""
    with whole_folder(out, replaces=replaces) as folder:
        (folder / "page.html").write_text("hours of work")
        out.mkdir()
        (out / "theirs").write_text("theirs")


def left_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def refused(out: Path, **options) -> str:
    """The message of a folder that is refused before the work begins."""
    with pytest.raises(AegpoError) as caught, whole_folder(out, **options):
        pytest.fail("the work began")
    return str(caught.value)


# --- what can be made ------------------------------------------------------------------------------------------------


def test_a_folder_appears_at_the_end_and_nothing_beside_it(tmp_path):
    out = tmp_path / "above" / "out"
    with whole_folder(out) as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "file").write_text("x")
        assert not out.exists()
    assert left_in(tmp_path) == ["above", "above/out", "above/out/inner", "above/out/inner/file"]
    assert out.stat().st_mode == (tmp_path / "above").stat().st_mode


def test_an_empty_folder_becomes_what_was_made(tmp_path):
    (tmp_path / "out").mkdir()
    make(tmp_path / "out")
    assert left_in(tmp_path) == ["out", "out/page.html"]


def test_work_that_fails_leaves_nothing_behind_and_an_empty_folder_as_it_was(tmp_path):
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "above" / "out", tmp_path / "empty"):
        with pytest.raises(KeyboardInterrupt):
            stopped_halfway(out)
    assert left_in(tmp_path) == ["empty"]


def test_what_an_earlier_call_wrote_is_replaced_with_all_that_was_in_it(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "page.html").write_text("old")
    (out / "only-old.png").write_text("old")
    make(out, replaces=("page.html", "only-old.png"))
    assert left_in(tmp_path) == ["out", "out/page.html"]
    assert (out / "page.html").read_text() == "new"


# --- what is refused -------------------------------------------------------------------------------------------------


def test_a_folder_with_something_in_it_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    ending = "and nothing is overwritten; choose another folder, or remove it"
    assert refused(tmp_path, option="--to") == f"--to {tmp_path}: is there already, {ending}"
    stranger = "and has what this command did not write, such as 'mine.txt'"
    assert refused(tmp_path, replaces=("page.html",)) == f"--out {tmp_path}: is there already {stranger}, {ending}"
    assert left_in(tmp_path) == ["mine.txt"]


def test_a_file_is_refused(tmp_path):
    (tmp_path / "out").write_text("mine")
    assert refused(tmp_path / "out") == (
        f"--out {tmp_path / 'out'}: is a file, and nothing is overwritten; choose another folder, or remove it"
    )


def test_a_folder_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    assert refused(tmp_path / "file" / "out") == (
        f"--out {tmp_path / 'file' / 'out'}: cannot be written to: {tmp_path / 'file'} is a file; choose another folder"
    )


@pytest.mark.parametrize("there", [True, False])
def test_a_link_is_refused_wherever_it_leads(tmp_path, there):
    if there:
        (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "real")
    message = refused(tmp_path / "out")
    assert message.startswith(f"--out {tmp_path / 'out'}: is a link, to {tmp_path / 'real'}; give the folder itself")
    assert (tmp_path / "out").is_symlink()


@pytest.mark.parametrize("out", [".", "..", "../here", "{absolute}"])
def test_the_working_directory_and_what_holds_it_are_refused(tmp_path, monkeypatch, out):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    given = Path(out.format(absolute=tmp_path / "here"))
    assert refused(given) == f"--out {given}: is where you are, and cannot be replaced; give a folder of its own"


def test_a_mount_point_is_refused():
    assert refused(Path("/proc")) == "--out /proc: is a mount point, and cannot be replaced; give a folder below it"


def test_a_name_that_is_too_long_is_refused_and_the_longest_that_is_not_is_made(tmp_path):
    assert refused(tmp_path / "above" / ("x" * 256)).endswith("File name too long; choose another folder")
    assert left_in(tmp_path) == []
    make(tmp_path / ("x" * 255))
    assert left_in(tmp_path) == ["x" * 255, f"{'x' * 255}/page.html"]


def test_a_place_where_nothing_can_be_made_is_refused():
    message = refused(Path("/proc/aegpo"))  # where not even root makes a folder
    assert message.startswith("--out /proc/aegpo: cannot be written to: ")
    assert message.endswith("; choose another folder")


READ_ONLY = """
mount -t tmpfs none "$1" && mkdir "$1/empty" && mount -o remount,ro "$1" || exit 77
exec "$2" -c '
import sys
from pathlib import Path
from aegpo.core.files import whole_folder
from aegpo.errors import AegpoError
for name in ("new", "empty"):
    try:
        with whole_folder(Path(sys.argv[1]) / name):
            print("the work began")
    except AegpoError as error:
        print(error)
' "$1"
"""


def test_a_disk_that_is_read_only_is_refused(tmp_path):
    words = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", READ_ONLY, "sh", tmp_path, sys.executable]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no unshare")
    if done.returncode in (1, 77):
        pytest.skip("this system lets nobody mount a disk of his own")
    assert done.stdout.splitlines() == [
        f"--out {tmp_path / name}: cannot be written to: Read-only file system; choose another folder"
        for name in ("new", "empty")
    ]


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_folder_of_somebody_else_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    assert refused(tmp_path / "out").endswith("cannot be written to: Permission denied; choose another folder")
    tmp_path.chmod(0o700)


# --- what goes wrong later -------------------------------------------------------------------------------------------


@contextmanager
def files_up_to(size: int):
    """Inside, no file may grow beyond so many bytes: the system refuses it as it refuses a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_becomes_full_is_one_message_and_nothing_is_kept(tmp_path):
    with files_up_to(1000), pytest.raises(AegpoError) as caught, whole_folder(tmp_path / "out") as folder:
        (folder / "large").write_bytes(bytes(2000))
    assert str(caught.value) == (
        f"--out {tmp_path / 'out'}: cannot be written to: File too large; nothing was kept: make room, or choose "
        "another folder"
    )
    assert left_in(tmp_path) == []


def test_any_other_failure_of_the_work_is_not_taken_for_the_disks(tmp_path):
    with pytest.raises(FileNotFoundError), whole_folder(tmp_path / "out"):
        Path(tmp_path / "nowhere").read_text()


@pytest.mark.parametrize("replaces", [(), ("page.html",)])
def test_what_was_made_is_kept_if_somebody_took_the_place_meanwhile(tmp_path, replaces):
    out = tmp_path / "out"
    with pytest.raises(AegpoError) as caught:
        outrun(out, replaces)
    (folder,) = (path for path in tmp_path.iterdir() if path != out)
    assert str(caught.value) == (
        f"{out} was made but cannot be put in place: Directory not empty; it is kept in {folder}: move it yourself"
    )
    assert (folder / "page.html").read_text() == "hours of work"
    assert (out / "theirs").read_text() == "theirs"


# --- folders that files are put into ---------------------------------------------------------------------------------


def test_a_folder_for_files_is_made_once_and_keeps_what_it_has(tmp_path):
    folder = open_folder(tmp_path / "above" / "report")
    (folder / "mine").write_text("mine")
    assert open_folder(folder) == folder
    assert left_in(folder) == ["mine"]


def test_a_folder_for_files_that_is_a_file_or_has_a_folder_in_the_place_of_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        AegpoError, match=r"--out .*file: cannot be written to: .*file is a file; choose another folder"
    ):
        open_folder(tmp_path / "file")
    (tmp_path / "page.html").mkdir()
    with pytest.raises(AegpoError, match=r"page\.html: is a folder where a file goes; move it, or choose another"):
        open_folder(tmp_path, files=("page.html",))
    with pytest.raises(AegpoError, match="/proc: cannot be written to: "):
        open_folder(Path("/proc"))


def test_a_whole_tree_is_waited_for_with_links_that_lead_nowhere(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "file").write_text("x")
    (tmp_path / "inner" / "link").symlink_to("nowhere")
    sync_all(tmp_path)
    assert left_in(tmp_path) == ["inner", "inner/file", "inner/link"]
