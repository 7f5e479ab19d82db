"""Runs of one experiment in several folders: one report, the same as of one folder; or what does not fit."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import asdict, replace

import pytest
from rich.console import Console
from studies import AEGPO, ARMS, GRPO, RANDOM, World, write_experiment

from aegpo.errors import AegpoError
from aegpo.report import rebuild_report
from aegpo.report.exports import CSV_FILES, escaped
from aegpo.report.recorded import compared_to, read_study
from aegpo.report.summary import summarize

SMALL = World(training_steps=10, every=5, prompts=12)


def apart(folder, arms=(GRPO, AEGPO, RANDOM), **asked):
    """The runs of one experiment in one folder, and the same in two: seeds 0 and 1, and seed 2."""
    whole = write_experiment(folder / "whole", arms, world=SMALL, **asked)
    parts = []
    for name, seeds in (("one", (0, 1)), ("two", (2,))):
        part = folder / name
        for arm in arms:
            for seed in seeds:
                shutil.copytree(whole / arm.name / f"seed-{seed}", part / arm.name / f"seed-{seed}")
        order = {"arms": [arm.name for arm in arms], "seeds": list(seeds), **asked}
        (part / "order.json").write_text(json.dumps(order))
        parts.append(part)
    return whole, parts


def change(run, **values):
    path = run / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["experiment"] |= values
    path.write_text(json.dumps(manifest))


def numbers(study):
    return {name: value for name, value in asdict(summarize(study)).items() if name not in ("name", "notes")}


def test_seeds_in_two_folders_are_reported_as_in_one(tmp_path):
    asked = {"margin": 0.03, "about": {"grpo": "the reference"}, "controls": {"aegpo": "random-steps"}}
    whole, parts = apart(tmp_path, **asked)
    assert numbers(read_study(*parts)) == numbers(read_study(whole))
    assert read_study(*parts).notes == ()


def test_arms_in_two_folders_are_compared_as_any_of_the_folders_asks(tmp_path):
    one = write_experiment(tmp_path / "one", (GRPO, AEGPO), world=SMALL)
    two = write_experiment(tmp_path / "two", (RANDOM,), world=SMALL)
    study = read_study(one, two)
    assert study.arms == ("grpo", "aegpo", "random-steps")
    assert study.verdict.pairs(study.arms) == (("aegpo", "grpo"), ("random-steps", "grpo"))
    order = {"arms": ["random-steps"], "seeds": [0, 1, 2]}
    (two / "order.json").write_text(json.dumps(order))
    (one / "order.json").write_text(json.dumps(order | {"arms": ["grpo", "aegpo"], "comparisons": [["grpo", "aegpo"]]}))
    assert read_study(one, two).verdict.comparisons == (("grpo", "aegpo"),)


def test_where_a_run_was_and_who_watched_it_does_not_matter(tmp_path):
    _, parts = apart(tmp_path)
    change(parts[1] / "aegpo" / "seed-2", trackers=[{"kind": "console"}], device="cuda", about="other words")
    change(parts[1] / "grpo" / "seed-2", name="ablation", rollouts=ROLLOUTS | {"micro_batch": 2})
    change(parts[0] / "grpo" / "seed-0", rollouts=ROLLOUTS | {"micro_batch": 8})
    assert len(read_study(*parts).runs) == 9


ROLLOUTS = {"prompts_per_step": 8, "rollouts_per_step": 64, "denoising_steps": 10}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "other"}, "is of experiment 'ablation' and .* of 'other'; a report is of one experiment"),
        (
            {"rollouts": ROLLOUTS | {"rollouts_per_step": 32}},
            r"arm aegpo is not the same in .*:\n  rollouts\.rollouts_per_step: 64 -> 32\nrun both with one file",
        ),
    ],
)
def test_runs_that_are_not_of_one_experiment_are_refused(tmp_path, values, message):
    _, parts = apart(tmp_path)
    change(parts[1] / "aegpo" / "seed-2", **values)
    with pytest.raises(AegpoError, match=message):
        read_study(*parts)


def test_a_run_that_is_there_twice_is_refused(tmp_path):
    whole, parts = apart(tmp_path)
    with pytest.raises(AegpoError, match=r"seed \d of arm .* is in .*whole and in .*two; a report takes each run once"):
        read_study(whole, parts[1])


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"margin": 0.1}, "'margin' is None in .*one and 0.1 in .*two"),
        ({"target": 0.1}, "'target' is None in .*one and 0.1 in .*two"),
        ({"comparisons": [["grpo", "aegpo"]]}, "does not fit together: comparisons.2: compares 'grpo' with 'aegpo'"),
    ],
)
def test_folders_that_ask_for_different_things_are_refused(tmp_path, asked, message):
    _, parts = apart(tmp_path)
    path = parts[1] / "order.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | asked))
    with pytest.raises(AegpoError, match=message):
        read_study(*parts)


def test_two_controls_of_one_arm_are_refused(tmp_path):
    _, parts = apart(tmp_path)
    for part, control in zip(parts, ("random-steps", "grpo"), strict=True):
        path = part / "order.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"controls": {"aegpo": control}}))
    with pytest.raises(AegpoError, match="one: the control of aegpo is 'random-steps', elsewhere 'grpo'"):
        read_study(*parts)


def test_a_chosen_reference_comes_first_and_everything_is_compared_to_it(tmp_path):
    folder = write_experiment(tmp_path, ARMS, world=SMALL, comparisons=[["aegpo", "grpo"]], controls={"aegpo": "grpo"})
    study = compared_to(read_study(folder), "random-steps")
    found = summarize(study)
    assert study.arms[0] == "random-steps"
    others = list(study.arms[1:])
    assert [each.arm for each in found.compared("palette") if each.reference == "random-steps"] == others
    assert [(each.arm, each.reference) for each in found.compared("palette")][-1] == ("aegpo", "grpo")
    assert found.costs[0].relative_cost == 1
    assert compared_to(read_study(folder), "aegpo").verdict.controls is None
    with pytest.raises(AegpoError, match="--reference: no arm is called 'gpo'; did you mean 'grpo'"):
        compared_to(study, "gpo")


@pytest.mark.slow
def test_numbers_go_to_csv_and_latex_and_plots_to_svg_and_pdf(tmp_path):
    folder = write_experiment(tmp_path / "study", ARMS, world=SMALL)
    written = rebuild_report((folder,), tmp_path / "out", Console(quiet=True), None, ("latex", "csv"), ("svg", "pdf"))
    extras = tmp_path / "out" / "report"
    assert sorted(path.name for path in extras.iterdir()) == sorted({path.name for path in written})
    assert not (tmp_path / "out" / "report.html").exists()
    summary = summarize(read_study(folder))
    for name in CSV_FILES:
        with (extras / name).open() as file:
            assert list(csv.DictReader(file)), name
    with (extras / "scores.csv").open() as file:
        rows = {(row["place"], row["label"], row["arm"]): row for row in csv.DictReader(file)}
    for score in summary.scores:
        assert float(rows["equal steps", score.label, score.arm]["gain"]) == pytest.approx(score.gain, rel=1e-5)
    with (extras / "curves.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(ARMS) * 3 * 2 * 3  # arms, seeds, labels, evaluations
    text = (extras / "tables.tex").read_text()
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == text.count(r"\toprule") > 5
    assert r"95 \% CI" in text
    assert (extras / "gains.pdf").read_bytes().startswith(b"%PDF")
    assert (extras / "gains.svg").read_text().startswith("<?xml")


def test_latex_gets_no_commands_from_names():
    assert escaped(r"a_b & 50 % of $x^2$ \input{y} ~") == (
        r"a\_b \& 50 \% of \$x\textasciicircum{}2\$ \textbackslash{}input\{y\} \textasciitilde{}"
    )
    assert escaped("[+1, +2]") == "{[+1, +2]}"


@pytest.mark.slow
def test_the_same_report_is_written_by_both_ways(tmp_path):
    folder = write_experiment(tmp_path, (GRPO, replace(AEGPO, noise=0.1)), world=SMALL)
    (page,) = rebuild_report((folder,), folder, Console(quiet=True))
    first = page.read_text()
    rebuild_report((folder,), tmp_path / "again", Console(quiet=True), formats=("html", "csv"))
    name = folder.name
    assert (tmp_path / "again" / "report.html").read_text() == first
    assert name in first
