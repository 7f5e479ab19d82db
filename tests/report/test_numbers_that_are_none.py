"""Metrics and scores that are NaN or infinite: recorded as JSON, read back as they were, and named by a report."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from aegpo.core.as_json import dumps, loads
from aegpo.report import write_report
from aegpo.report.recorded import read_study
from aegpo.runs.progress import Record
from aegpo.runs.records import RowFile

MADE = Path(__file__).parents[1] / "data" / "run-0.1.0"
RUN = Path("aegpo/seed-0")
ODD = {"reward": math.nan, "ratio": math.inf, "approx_kl": -math.inf, "clipped": 0.1 + 0.2}


@pytest.fixture
def study(tmp_path) -> Path:
    return shutil.copytree(MADE / "small", tmp_path / "small")


def strict(text: str):
    def refuse(word: str):
        raise AssertionError(f"{word} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_every_row_of_a_record_is_json_whatever_its_numbers(tmp_path):
    scores = {"palette": [math.nan, 0.5]}
    evaluation = {"step": 1, "scores": scores, "base_scores": {"palette": [0.5, 0.5]}, "prompts": ["NaN", "Infinity"]}
    metrics = {"step": 1, "metrics": ODD, "prompts": [0], "signals": {"entropy": [[None, math.inf]]}}
    rows = {"metrics": metrics, "evaluations": evaluation, "timing": {"step": 1, "seconds": {"rollout": math.inf}}}
    for name, row in rows.items():
        RowFile(tmp_path / f"{name}.jsonl").append(row)
        text = (tmp_path / f"{name}.jsonl").read_text()
        strict(text)
        read = loads(text)
        assert read.pop("crc32")
        np.testing.assert_equal(read, row)
    standing = Record(tmp_path, 2).read()
    assert standing.reward is not None
    assert math.isnan(standing.reward)
    assert math.isnan(standing.evaluation["palette"])


def change(path: Path, line: int, edit, write=dumps) -> None:
    rows = [loads(row) for row in path.read_text().splitlines()]
    edit(rows[line])
    path.write_text("".join(write(row) + "\n" for row in rows))


@pytest.mark.parametrize("write", [dumps, json.dumps], ids=["as now", "as version 0.1.0"])
def test_a_report_leaves_odd_metrics_out_and_says_where(study, write):
    for line in (0, 2):
        change(
            study / RUN / "metrics.jsonl", line, lambda row: row["metrics"].update(ODD, residual_noise=math.nan), write
        )
    older = write is json.dumps  # whose signals had keys of their own

    def odd_signals(row) -> None:
        entropy, delta = row.pop("entropy"), [math.inf, 1.0]
        del row["delta"]
        entropy[0][2] = math.inf
        now = {"signals": {"entropy": entropy, "entropy-delta": delta}}
        row.update({"entropy": entropy, "delta": delta} if older else now)

    change(study / RUN / "metrics.jsonl", 1, odd_signals, write)
    page = write_report(study, Console(quiet=True)).read_text()
    assert read_study(study).notes == (
        *(
            f"seed 0 of arm aegpo: the metric '{name}' is not a finite number at steps 1, 3, and left out there"
            for name in ("approx_kl", "ratio", "residual_noise", "reward")
        ),
        "seed 0 of arm aegpo: the signal 'entropy' is not a finite number at step 2, and left out there",
        "seed 0 of arm aegpo: the signal 'entropy-delta' is not a finite number at step 2, and left out there",
    )
    assert "is not a finite number at steps 1, 3" in page
    strict((study / "report" / "summary.json").read_text())
    assert "nan" not in (study / "report" / "summary.json").read_text().lower()


def test_many_odd_steps_are_counted(study):
    rows = [loads(row) for row in (study / RUN / "metrics.jsonl").read_text().splitlines()]
    rows = [rows[0] | {"step": step, "metrics": {"ratio": math.inf}} for step in range(1, 9)]
    (study / RUN / "metrics.jsonl").write_text("".join(dumps(row) + "\n" for row in rows))
    note = "seed 0 of arm aegpo: the metric 'ratio' is not a finite number at steps 1, 2, 3, 4, 5, 3 more, and left out"
    assert f"{note} there" in read_study(study).notes


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("line", [0, 1, 2])
def test_an_evaluation_with_an_odd_score_is_left_out_and_the_rest_reported(study, number, line):
    step = (0, 2, 3)[line]
    change(study / RUN / "evaluations.jsonl", line, lambda row: row["scores"]["palette"].__setitem__(1, number))
    page = write_report(study, Console(quiet=True)).read_text()
    assert f"a score of &#39;palette&#39; is not a finite number at step {step}, and left out there" in page
    found = read_study(study)
    assert step not in [row.step for row in found.runs["aegpo", 0].evaluations]
    assert found.runs["aegpo", 0].finished == (step != 3)
    strict((study / "report" / "summary.json").read_text())


def test_a_report_of_runs_whose_every_score_is_odd_is_still_written(study):
    for run in study.glob("*/seed-*"):
        for line in range(3):
            change(run / "evaluations.jsonl", line, lambda row: row["scores"]["palette"].__setitem__(0, math.nan))
    assert write_report(study, Console(quiet=True)).exists()
