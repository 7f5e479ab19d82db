"""Damaged shards: a run that stopped after step 2 of 4, with checkpoints of sharded weights that two processes wrote.

It goes on in one process, and ends with the bytes of a run of whole weights without a break; or is refused by name.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from damage import DAMAGES, Made, damage, judge, make, result, run_folder
from spreading import spread
from test_damaged_state import contents

CHECKPOINT = "checkpoints/step-000002"
ONE = "shards/shard-00002-model-00003-of-00003.safetensors"  # of process 2, policy/
OTHER = "shards/shard-00001-model-00002-of-00003.safetensors"  # of process 1, optimizer/
FILES = {
    ONE: (*DAMAGES, "bit flipped 0", "bit flipped 1", "bit flipped 2"),
    OTHER: ("deleted", "cut in half", "bit flipped 0"),
    "optimizer.safetensors": ("deleted", "bit flipped 0"),
    "rng.safetensors": ("deleted", "bit flipped 0"),
    "state.json": ("deleted", "{}", "bit flipped 0"),
    "checksums.json": ("deleted", "{}", "bit flipped 0"),
}


@pytest.fixture(scope="module")
def made(warm, tiny, tmp_path_factory) -> Made:
    return make(warm, tiny, tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def sharded(made) -> Path:
    """The runs that stopped, `aegpo` seed 0 with sharded checkpoints."""
    out = made.folder / "sharded"
    shutil.copytree(made.stopped, out)
    spread(made, out)
    return out


@pytest.fixture
def out(sharded, tmp_path) -> Path:
    shutil.copytree(sharded, tmp_path / "runs")
    return tmp_path / "runs"


def test_one_process_goes_on_from_shards_to_the_same_bytes(made, out):
    there = {str(path.relative_to(run_folder(out) / CHECKPOINT)) for path in (run_folder(out) / CHECKPOINT).rglob("*")}
    assert there >= {*FILES}
    assert "policy.safetensors" not in there
    assert judge(made, made.go(out), out, "nothing") == "same"


@pytest.mark.parametrize(("name", "how"), [(name, how) for name, hows in FILES.items() for how in hows])
def test_a_damaged_shard_changes_nothing_or_is_refused_by_name(made, out, name, how, request):
    path = run_folder(out) / CHECKPOINT / name
    damage(path, how, request.config.getoption("--fault-seed"))
    before, ended = contents(out), made.go(out)
    if judge(made, ended, out, path.name) == "refused":
        assert contents(out) == before, "what is refused is left as it is"
    else:
        assert "step-000002" in ended.out, "a checkpoint that is passed over is named"


# --- strangers, and what a killed writer leaves ----------------------------------------------------------------------


def a_strangers_file(run: Path) -> None:
    shutil.copy(run / CHECKPOINT / ONE, run / CHECKPOINT / "shards" / "x.safetensors")


def a_file_of_another_checkpoint(run: Path) -> None:
    shutil.copy(run / "checkpoints/step-000001" / ONE, run / CHECKPOINT / ONE)


def a_file_of_another_process(run: Path) -> None:
    shutil.copy(run / CHECKPOINT / ONE.replace("shard-00002", "shard-00001"), run / CHECKPOINT / ONE)


def all_of_another_checkpoint(run: Path) -> None:
    shutil.rmtree(run / CHECKPOINT / "shards")
    shutil.copytree(run / "checkpoints/step-000001/shards", run / CHECKPOINT / "shards")


def a_file_instead(run: Path) -> None:
    shutil.rmtree(run / CHECKPOINT / "shards")
    (run / CHECKPOINT / "shards").write_text("x")


def none_at_all(run: Path) -> None:
    shutil.rmtree(run / CHECKPOINT / "shards")


def a_folder_among_them(run: Path) -> None:
    (run / CHECKPOINT / "shards" / "more").mkdir()


def a_path_outside(run: Path) -> None:
    path = run / CHECKPOINT / "checksums.json"
    content = json.loads(path.read_text())
    content["sha256"]["shards/../../../manifest.json"] = "0" * 64
    path.write_text(json.dumps(content))


STRANGE: dict[str, Callable[[Path], None]] = {
    act.__name__.replace("_", " "): act
    for act in (
        a_strangers_file,
        a_file_of_another_checkpoint,
        a_file_of_another_process,
        all_of_another_checkpoint,
        a_file_instead,
        none_at_all,
        a_folder_among_them,
        a_path_outside,
    )
}


@pytest.mark.parametrize("name", STRANGE)
def test_shards_that_are_not_the_checkpoint_s_own_are_passed_over_and_named(made, out, name):
    STRANGE[name](run_folder(out))
    ended = made.go(out)
    assert judge(made, ended, out, "step-000002") == "same"
    assert "step-000002" in ended.out


def test_what_a_killed_writer_left_is_removed(made, out):
    run = run_folder(out)
    left = run / "checkpoints" / ".step-000003.tmp"
    shutil.copytree(run / CHECKPOINT / "shards", left / "shards")
    (left / ONE).write_bytes(b"half")
    assert judge(made, made.go(out), out, "nothing") == "same"
    assert not left.exists()
    assert result(out) == result(made.whole)


def test_if_all_are_damaged_each_is_named_with_the_way_out(made, out):
    for step in (1, 2):
        (run_folder(out) / f"checkpoints/step-00000{step}" / ONE).unlink()
    before, ended = contents(out), made.go(out)
    assert judge(made, ended, out, r"step-000001: shards/shard-00002") == "refused"
    assert contents(out) == before
