"""The command for a GPU: what it needs on a machine without a network, what becomes of sections, what it writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import zipfile

import pytest
from repository import ROOT

sys.path.insert(0, str(ROOT / "tools"))

import gpu
from gpu_sections import markdown
from gpu_sections.sections import Record, Section, run_apart
from gpu_sections.wheels import Dist, markers, planned, read_wheels, wanted

COMMON = {"device": "a GPU", "cores": 16, "torch": "2.11.0", "cuda": "13.0", "python": "3.12.3"}
COMMON |= {"date": "2026-11-27", "commit": "abc", "dry": False}


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_section_runs_on_a_cpu_with_tiny_sizes(tmp_path):
    command = [sys.executable, str(ROOT / "tools" / "gpu.py"), "--dry", "--minutes", "14"]
    command += ["--rows", str(tmp_path / "rows.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = rows(tmp_path / "rows.jsonl")
    assert [row["section"] for row in found if "section_seconds" in row] == list(gpu.NAMES)
    assert not [row for row in found if "error" in row or row.get("ok") is False]
    for name in gpu.NAMES:  # a number each, and what it was measured on
        assert [row for row in found if row["section"] == name and "what" in row and "skipped" not in row]
    assert all(row["device"] == "cpu" and row["torch"] and row["dry"] for row in found)
    told = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert [json.loads(line) for line in told] == found
    with pytest.raises(SystemExit, match="nothing that was measured on a GPU"):
        markdown.write(tmp_path / "rows.jsonl", tmp_path / "BENCHMARKS.md")


def test_the_command_line_offers_every_section_and_the_most_valuable_first():
    assert tuple(section.name for section in gpu.sections()) == gpu.NAMES
    assert gpu.NAMES[:3] == ("entropy", "sd35", "flux")


# --- what becomes of a section ---------------------------------------------------------------------------------------


def good(job):
    yield {"what": "sum", "number": 3.0}


def failing(job):
    yield {"what": "first", "number": float("inf")}
    raise ValueError("the second one\ncannot be measured")


def dying(job):
    yield {"what": "first"}
    os._exit(7)


def endless(job):
    yield {"what": "first"}
    time.sleep(60)


def wrong(job):
    yield {"what": "a check", "ok": False}


@pytest.mark.parametrize("run", [good, failing, dying, endless, wrong], ids=lambda run: run.__name__)
def test_a_section_leaves_its_rows_whatever_becomes_of_it(run, tmp_path):
    record = Record(tmp_path / "rows.jsonl", {"device": "cpu"})
    begin = time.monotonic()
    seconds = 1.5 if run is endless else 30
    fine = run_apart(Section("one", "does it?", run, 1), True, begin + seconds, record, "fork")
    assert fine == (run is good)
    assert time.monotonic() - begin < 20
    found = rows(tmp_path / "rows.jsonl")
    assert found[0]["what"] in ("sum", "first", "a check")
    assert all(row["section"] == "one" and row["device"] == "cpu" for row in found)
    errors = [row for row in found if "error" in row]
    said = {failing: "ValueError: the second one cannot be measured", dying: "ended with 7"}
    said |= {endless: "ended, for time was over"}
    assert [row["error"] for row in errors] == ([said[run]] if run in said else [])
    if run is failing:
        assert found[0]["number"] == "inf"
        assert "test_gpu_tool.py:" in errors[0]["at"]


def test_a_section_that_does_not_fit_is_left_out_and_says_so(tmp_path):
    record = Record(tmp_path / "rows.jsonl", {})
    assert gpu.one(Section("one", "does it?", failing, 40), False, time.monotonic() + 30, record, "fork")
    (row,) = rows(tmp_path / "rows.jsonl")
    assert row["skipped"] in ("30 s are left, it takes about 40", "29 s are left, it takes about 40")


# --- wheels ----------------------------------------------------------------------------------------------------------

THERE = {"torch": Dist("2.11.0", ("numpy",)), "old": Dist("1.0", ()), "packaging": Dist("26.0", ())}


def test_only_what_is_missing_or_too_old_is_installed():
    carried = {"old": Dist("2.1", ("new-part>=1; python_version >= '3'",)), "new-part": Dist("1.2", ())}
    carried |= {"packaging": Dist("26.4", ())}
    asked = ["torch>=2.6,<2.14", "old>=2", "packaging>=20", "nothing; sys_platform == 'win32'"]
    plan = planned(asked, THERE.get, carried.get, {**markers(), "sys_platform": "linux"})
    assert plan.install == {"old": "2.1", "new-part": "1.2"}
    assert not plan.missing


def test_what_wheels_lack_is_named_with_what_there_is():
    plan = planned(["old>=3", "other", "scipy>=1"], THERE.get, {"old": Dist("2.1", ())}.get, markers())
    assert plan.missing == {"old": ">=3 (1.0 installed, 2.1 carried)", "other": "any version (not there)"}


def test_here_nothing_is_missing():
    from gpu_sections.wheels import installed

    plan = planned(wanted(), installed, lambda name: None, markers())
    assert not plan.install
    assert set(plan.missing) <= {"ftfy"}


def test_a_wheel_says_what_it_is_and_two_of_one_are_refused(tmp_path):
    for version in ("1.0", "2.0"):
        with zipfile.ZipFile(tmp_path / f"Some_Part-{version}-py3-none-any.whl", "w") as wheel:
            text = f"Metadata-Version: 2.1\nName: Some_Part\nVersion: {version}\nRequires-Dist: other>=1\n"
            wheel.writestr(f"some_part-{version}.dist-info/METADATA", f"{text}\nRequires-Dist: of-the-text\n")
        if version == "1.0":
            assert read_wheels(tmp_path) == {"some-part": Dist("1.0", ("other>=1",))}
    with pytest.raises(SystemExit, match="two wheels of some-part"):
        read_wheels(tmp_path)


# --- what is written -------------------------------------------------------------------------------------------------


def test_rows_become_tables_and_long_rows_stand_upright(tmp_path):
    said = [{"section": "machine", "minutes": 9.0}]
    said += [{"section": "nccl", "what": what, "ok": ok, "seconds": None} for what, ok in (("a", True), ("b", False))]
    said += [{"section": "sd35", "what": "step", **{f"number_{n}": n / 3 for n in range(9)}}]
    said += [{"section": "sd35", "section_seconds": 12.5}]
    path, record = tmp_path / "rows.jsonl", tmp_path / "BENCHMARKS.md"
    path.write_text("".join(json.dumps({**row, **COMMON}) + "\n" for row in said))
    record.write_text("# Benchmarks\n\nBy tools.\n\n## engine, cpu\n\nfast\n\n## gpu\n\nolder\n")
    markdown.write(path, record)
    text = record.read_text()
    assert "older" not in text
    assert "## engine, cpu\n\nfast" in text
    assert "2026-11-27, a GPU, 16 cores, Python 3.12.3, torch 2.11.0, CUDA 13.0, commit abc." in text
    assert "| what | ok | seconds |\n| --- | ---: | ---: |\n| a | yes | - |\n| b | no | - |" in text
    assert "|  | step |\n| --- | ---: |\n| number_0 | 0 |\n| number_1 | 0.3333 |" in text
    assert "Section `sd35` took 12.5 s." in text
