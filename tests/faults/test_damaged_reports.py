"""A file of a finished run is damaged; the command is given again, which reports, and `aegpo report` alone.

The report is written and says what it left out, or the command is refused with the file's name and the way out.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from damage import Made, assert_no_crash, damage, damages, make, run_folder

RUN = "tiny/aegpo/seed-0"
NAMES = ("manifest.json", "metrics.jsonl", "evaluations.jsonl", "timing.jsonl", "finished.json")
NOTHING_LOST = ("finished.json", "cut by a byte")  # its newline: the note says all it said
FILES = ("tiny/order.json", *(f"{RUN}/{name}" for name in NAMES), *(f"{RUN}/images/step-00000{n}.png" for n in (0, 4)))
CASES = [pytest.param(name, how, id=f"report over {Path(name).name}: {how}") for name in FILES for how in damages(name)]


@pytest.fixture(scope="module")
def made(warm, tiny, tmp_path_factory) -> Made:
    return make(warm, tiny, tmp_path_factory.mktemp("reports"))


@pytest.fixture
def out(made, tmp_path):
    """A copy of the runs that finished."""
    shutil.copytree(made.whole, tmp_path / "runs", symlinks=True)
    return tmp_path / "runs"


@pytest.mark.parametrize(("name", "how"), CASES)
def test_a_report_says_what_it_left_out(made, out, name, how, request):
    path = out / name
    damage(path, how, request.config.getoption("--fault-seed"))
    lost = not path.exists()
    ended = made.go(out, report=True)
    assert_no_crash(ended)
    assert ended.code in (0, 2), ended.out
    if ended.code == 2:
        assert path.name in ended.error
        assert re.search(r"put .* back|--fresh|delete|move|take .* out", ended.out)
    elif not (lost and path.name in ("order.json", "finished.json")) and (path.name, how) != NOTHING_LOST:
        # a lost order or note that a run is finished is written anew by the command
        said = "wall-clock" if path.name == "timing.jsonl" else path.name
        assert said in ended.out, ended.out
    if path.name in ("metrics.jsonl", "evaluations.jsonl", "manifest.json") and ended.code == 0:
        numbers = json.loads((out / "tiny" / "report" / "summary.json").read_text())
        of_arm = [score["seeds"] for score in numbers["scores"] if score["arm"] == "aegpo"]
        assert of_arm
        assert all(seeds == [1] for seeds in of_arm), "a damaged run is in no table"


def test_a_report_of_whole_runs_leaves_nothing_out(made, out):
    assert made.go(out, report=True).code == 0
    numbers = json.loads((out / "tiny" / "report" / "summary.json").read_text())
    assert numbers["notes"] == []
    assert run_folder(out).is_dir()
