"""What a report concludes from runs whose true effects are known, and which runs it takes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from studies import (
    AEGPO,
    ARMS,
    GRPO,
    RANDOM,
    SEEDS,
    Arm,
    World,
    difference,
    numbers_of,
    report,
    score,
    write_experiment,
    write_run,
)

from aegpo.errors import AegpoError
from aegpo.report import write_report
from aegpo.report.recorded import read_study
from aegpo.report.statistics import detectable_shift
from aegpo.report.summary import summarize
from aegpo.report.verdict import verdict


def test_known_gains_are_recovered_and_the_large_difference_is_found(reported):
    _, numbers, _ = reported
    for arm in ARMS:
        for label, gain in arm.gains.items():
            assert score(numbers, arm.name, label)["gain"] == pytest.approx(gain, abs=0.025)
    found = difference(numbers, "aegpo")
    assert found["over_seeds"]["low"] > 0
    assert found["mean"] == pytest.approx(0.05, abs=0.02)
    assert difference(numbers, "grpo") is None


def test_the_numbers_are_those_of_a_calculation_by_hand(written, reported):
    _, numbers, _ = reported

    def gains(arm, seed):
        lines = (written / arm / f"seed-{seed}" / "evaluations.jsonl").read_text().splitlines()
        last = json.loads(lines[-1])
        return np.array(last["scores"]["palette"]) - np.array(last["base_scores"]["palette"])

    table = np.array([[gains(arm.name, seed).mean() for seed in SEEDS] for arm in ARMS])
    rests = table - table.mean(axis=1, keepdims=True) - table.mean(axis=0) + table.mean()
    error = np.sqrt(2 * (rests**2).sum() / 8 / 3)
    found, by_seed = difference(numbers, "selection"), table[2] - table[0]
    assert found["by_seed"] == pytest.approx(by_seed)
    assert found["df"] == 8
    assert found["over_seeds"]["low"] == pytest.approx(by_seed.mean() - 2.306004 * error, rel=1e-5)
    assert found["smallest_detectable"] == pytest.approx(detectable_shift(8) * error, rel=1e-5)
    assert found["margin"] == pytest.approx(table[0].mean() / 5)


def test_the_verdict_names_the_winner_and_the_guard_that_fell(reported):
    _, numbers, terminal = reported
    text = " ".join(numbers["verdict"])
    where = "at equal steps (40) and at equal cost (55,200) alike"
    first = f"On the trained reward palette, {where}: aegpo gained more than grpo."
    guard = f"On the guard scene, {where}: random-steps gained less than grpo."
    assert numbers["verdict"][:2] == [f"{first} Arms differ on the guard scene.", guard]
    assert "Against the base, the trained palette rose on held-out prompts in every arm, each 95 % CI above 0." in text
    assert re.search(
        r"guard scene, which no arm optimised, fell in random-steps \(-0\.0\d+\): a sign of reward hack", text
    )
    assert numbers["verdict"][0] in " ".join(terminal.split())


def test_costs_count_the_probe_and_three_for_each_trained_edge(reported):
    _, numbers, _ = reported
    costs = {row["arm"]: row for row in numbers["costs"]}
    assert costs["grpo"]["cost"] == 40 * (640 + 3 * 600)
    assert costs["aegpo"]["forwards"] == 40 * (420 + 160)
    assert costs["aegpo"]["signal_forwards"] == 40 * 160
    assert costs["aegpo"]["relative_cost"] == pytest.approx((580 + 960) / 2440)
    assert costs["grpo"]["training_seconds"] == pytest.approx(40 * (0.001 + 1.6 + 0.2 + 3.0))
    assert costs["grpo"]["total_seconds"] == pytest.approx(40 * 4.801 + 9 * 2.0)


def test_evaluations_that_were_lost_are_named(tmp_path):
    write_experiment(tmp_path, (GRPO, AEGPO), seeds=(0, 1))
    for arm, seed, kept in (("grpo", 1, (0, 1, 4, 5, 6, 7, 8)), ("aegpo", 0, (8,)), ("aegpo", 1, ())):
        path = tmp_path / arm / f"seed-{seed}" / "evaluations.jsonl"
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(lines[index] for index in kept))
    html, numbers, terminal = report(tmp_path, width=250)
    nothing = "the arm's curve has nothing there"
    notes = [
        "seed 1 of arm aegpo: 40 of 40 steps, not marked finished or last step not evaluated",
        "seed 0 of arm aegpo: evaluations.jsonl lacks the evaluation before training and the evaluations after steps "
        f"5, 10, 15, 20, 3 more; {nothing}",
        "seed 1 of arm aegpo: evaluations.jsonl lacks the evaluation before training and the evaluations after steps "
        f"5, 10, 15, 20, 4 more; {nothing}",
        f"seed 1 of arm grpo: evaluations.jsonl lacks the evaluations after steps 10, 15; {nothing}",
    ]
    assert numbers["notes"] == notes
    assert all(note in terminal for note in notes)
    assert html.count("evaluations.jsonl lacks") == 3


def test_unfinished_and_missing_runs_are_named_and_left_out(tmp_path):
    world = World()
    write_experiment(tmp_path, (GRPO,), world=world)
    write_run(tmp_path, AEGPO, 0, world, 40)
    write_run(tmp_path, AEGPO, 2, world, 12)
    write_run(tmp_path, RANDOM, 0, world, 40)
    (tmp_path / "order.json").write_text(json.dumps({"arms": ["grpo", "aegpo"], "seeds": [0, 1, 2]}))
    html, numbers, terminal = report(tmp_path)
    notes = [
        "seed 1 of arm aegpo: not started",
        "seed 2 of arm aegpo: 12 of 40 steps",
        "seed 0 of arm random-steps is in the folder but not in the experiment: left out",
    ]
    assert numbers["notes"] == notes
    for note in notes:
        assert note in html
        assert note in terminal
    assert score(numbers, "aegpo")["seeds"] == [0]
    assert difference(numbers, "aegpo")["over_seeds"] is None
    assert "with 1 seed no interval over seeds is possible" in numbers["verdict"][0]
    assert not any(row["arm"] == "random-steps" for row in numbers["scores"])


def test_one_seed_has_an_interval_over_prompts_that_says_so(tmp_path):
    html, numbers, _ = report(write_experiment(tmp_path, (GRPO, AEGPO), seeds=(4,)))
    assert numbers["verdict"][0] == "No verdict between arms: with 1 seed no interval over seeds is possible."
    assert score(numbers, "grpo")["gain_interval"]["low"] < 0.05 < score(numbers, "grpo")["gain_interval"]["high"]
    assert "(prompts only)" in html


def test_a_run_that_has_only_begun_still_gets_a_page(tmp_path):
    write_run(tmp_path, GRPO, 0, World(), 0)
    html, numbers, _ = report(tmp_path)
    assert numbers["verdict"] == ["No run is finished, so there is no verdict yet."]
    assert "seed 0 of arm grpo: 0 of 40 steps" in html


def test_a_line_that_was_being_written_is_left_out_but_a_damaged_one_is_refused(tmp_path):
    write_experiment(tmp_path, (GRPO,), seeds=(0,))
    path = tmp_path / "grpo" / "seed-0" / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 41, "metr')
    assert read_study(tmp_path).runs["grpo", 0].steps_done == 40
    path.write_text("{broken\n" + path.read_text())
    with pytest.raises(AegpoError, match=r"cannot read .*metrics\.jsonl"):
        read_study(tmp_path)


def test_arms_evaluated_on_different_prompts_are_refused(tmp_path):
    write_run(tmp_path, GRPO, 0, World(texts=("one", "two")), 40)
    write_run(tmp_path, AEGPO, 0, World(texts=("one", "three")), 40)
    with pytest.raises(AegpoError, match=r"grpo seed 0 was evaluated at step 0 on other prompts than aegpo seed 0"):
        read_study(tmp_path)


def test_a_folder_without_runs_is_refused(tmp_path):
    with pytest.raises(AegpoError, match="no run in"):
        write_report(tmp_path, Console())


def test_several_trained_rewards_are_judged_by_their_weighted_sum(tmp_path):
    rewards = ({"kind": "palette", "name": None, "weight": 2.0}, {"kind": "scene", "name": "layout", "weight": 0.5})
    gains = {"palette": 0.05, "layout": 0.04, "guard": 0.0}
    folder = write_experiment(tmp_path, [Arm("a", gains, rewards=rewards), Arm("b", gains, rewards=rewards)])
    numbers = numbers_of(folder)
    assert numbers["headline"] == "weighted sum"
    both = 2 * score(numbers, "a", "palette")["gain"] + 0.5 * score(numbers, "a", "layout")["gain"]
    assert score(numbers, "a", "weighted sum")["gain"] == pytest.approx(both)
    trained = {row["label"]: row["trained"] for row in numbers["scores"]}
    assert trained == {"weighted sum": True, "palette": True, "layout": True, "guard": False}


def test_without_an_order_file_arms_are_alphabetical(tmp_path):
    write_experiment(tmp_path, (GRPO, AEGPO), order=False)
    study = read_study(tmp_path)
    assert study.arms == ("aegpo", "grpo")
    assert verdict(summarize(study))[0].endswith(" alike: grpo gained less than aegpo.")
    assert Path(study.folder) == tmp_path


def test_observers_that_a_run_was_left_without_are_named(tmp_path):
    folder = write_experiment(tmp_path / "study", (GRPO,), seeds=(0,))
    row = {"step": 7, "event": "aegpo_on_step_end", "observer": "tracker 'far'", "error": "ConnectionError: gone"}
    (folder / "grpo" / "seed-0" / "dropped.jsonl").write_text(json.dumps(row) + "\n")
    told = "seed 0 of arm grpo, step 7: tracker 'far' failed with ConnectionError: gone, and the run went on without it"
    assert told in read_study(folder).notes
