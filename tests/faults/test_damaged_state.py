"""Every file of a run that stopped after step 2 of 4 is damaged; then the same command is given again.

It ends with the bytes of a run without a break, or is refused with the file's name and the way out.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from damage import Made, assert_no_crash, damage, damages, judge, make, result, run_folder

RUN = "tiny/aegpo/seed-0"
LAST = f"{RUN}/checkpoints/step-000002"
FILES = (
    "tiny/order.json",
    *(f"{RUN}/{name}" for name in ("manifest.json", "metrics.jsonl", "evaluations.jsonl", "timing.jsonl", ".lock")),
    *(f"{RUN}/images/step-00000{step}.png" for step in (0, 2)),
    *(f"{LAST}/{name}.safetensors" for name in ("policy", "ema", "optimizer", "rng")),
    *(f"{LAST}/{name}.json" for name in ("state", "checksums")),
    f"{RUN}/checkpoints/step-000001/state.json",
    *(f"{RUN}/signals/entropy/*/step-00000{step}.safetensors" for step in (1, 2)),
)
CASES = [
    pytest.param(name, how, id=f"{name.removeprefix('tiny/').removeprefix('aegpo/seed-0/')}: {how}")
    for name in FILES
    for how in damages(name)
]


@pytest.fixture(scope="module")
def made(warm, tiny, tmp_path_factory) -> Made:
    return make(warm, tiny, tmp_path_factory.mktemp("damage"))


@pytest.fixture
def out(made, tmp_path):
    """A copy of the runs that stopped."""
    shutil.copytree(made.stopped, tmp_path / "runs", symlinks=True)
    return tmp_path / "runs"


def test_every_file_of_a_run_is_damaged(made):
    run = run_folder(made.stopped)
    there = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    damaged = {str(path.relative_to(run)) for name in FILES for path in made.stopped.glob(name) if run in path.parents}
    same = {name for name in there - damaged if name.startswith("checkpoints/step-000001/")}  # as in the last one
    assert there - same == damaged


@pytest.mark.parametrize(("name", "how"), CASES)
def test_a_damaged_file_changes_nothing_or_is_refused_by_name(made, out, name, how, request):
    (path,) = out.glob(name)
    damage(path, how, request.config.getoption("--fault-seed"))
    before = contents(out)
    ended = made.go(out)
    if path.suffix == ".png" and how == "deleted":
        # Not a number of the run: it goes on without, and says so. The original took any damaged image for harmless.
        assert_no_crash(ended)
        assert ended.code == 0
        assert f"images/{path.name}" in ended.out
        shutil.copy(made.whole / RUN / "images" / path.name, path)
        assert result(out) == result(made.whole)
        return
    named = rf"{re.escape(path.name)}|{re.escape(path.parent.name)}"
    if judge(made, ended, out, named) == "refused":
        assert contents(out) == before, "what is refused is left as it is"
    elif path.parent.name == "step-000002":
        assert "step-000002" in ended.out, "a checkpoint that is passed over is named"


def contents(out: Path) -> dict[str, bytes]:
    """All that is there, but for what the locks hold."""
    paths = (path for path in out.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(out)): path.read_bytes() for path in paths}
