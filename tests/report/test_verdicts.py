"""What a report says of runs whose true effects are known: who differs, who is equal, at what cost, and how surely."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from studies import (
    AEGPO,
    ARMS,
    GRPO,
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
from aegpo.report.recorded import read_study


def test_arms_without_a_difference_get_no_winner(tmp_path):
    arms = [Arm(name, {"palette": 0.05, "scene": 0.0}) for name in ("grpo", "b", "c")]
    numbers = numbers_of(write_experiment(tmp_path, arms, world=World(seed_spread=0.02)))
    where = "On the trained reward palette, at equal steps (40), which cost the same"
    assert numbers["verdict"][0] == f"{where}: no difference that these 3 seeds can resolve."
    found = difference(numbers, "b")
    shown = re.search(
        r"With 3 seeds a true difference of ([\d.]+) would have shown 4 times in 5 \(95 % CI ([\d.]+) to ([\d.]+): the",
        " ".join(numbers["verdict"]),
    )
    known = [found["smallest_detectable"], found["detectable_range"]["low"], found["detectable_range"]["high"]]
    assert [float(each) for each in shown.groups()] == pytest.approx(known, abs=6e-3)
    assert re.search(
        r"At equal steps \(40\), which cost the same, no difference to grpo shows in b "
        r"\([-+.\d]+ \[[-+.\d]+, [-+.\d]+\]\) and c .*; none of them "
        r"is shown to be equal within 0\.0\d+, 20 % of grpo's gain \(TOST, smallest p = [\d.]+\)\.",
        " ".join(numbers["verdict"]),
    )


def test_arms_that_are_alike_within_the_margin_of_the_file_are_called_equal(tmp_path):
    arms = [Arm(name, {"palette": 0.05, "scene": 0.0}) for name in ("grpo", "b", "c")]
    folder = write_experiment(tmp_path, arms, world=World(seed_spread=0.001, noise=0.02), margin=0.04)
    numbers = numbers_of(folder)
    assert "; b and c are equal within 0.040, the margin of the file (TOST, p = " in " ".join(numbers["verdict"])
    assert difference(numbers, "b")["margin"] == 0.04
    assert difference(numbers, "b", label="scene")["margin"] != 0.04


def test_a_winner_that_does_not_survive_the_correction_is_not_announced_without_it(tmp_path):
    arms = [Arm(name, {"palette": gain}) for name, gain in (("grpo", 0.05), ("b", 0.07), ("c", 0.05), ("d", 0.05))]
    world = World(training_steps=2, every=2, seed_spread=0.007)
    numbers = numbers_of(write_experiment(tmp_path, arms, seeds=(24, 25, 26, 27), world=world))
    found = difference(numbers, "b")
    assert found["p"] < 0.05 < found["p_holm"] == pytest.approx(3 * found["p"])
    chance = "but that may be chance among 3 comparisons."
    assert numbers["verdict"][0].endswith(f": b gained more than grpo, {chance}")


def test_intervals_cover_known_gains_and_false_winners_are_rare(tmp_path):
    arms, covered, found = [Arm(name, {"palette": 0.05}) for name in ("a", "b")], 0, 0
    for trial in range(80):
        folder = tmp_path / str(trial)
        folder.mkdir()
        world = World(training_steps=2, every=2, prompts=12, seed_spread=0.02, draw=trial)
        numbers = numbers_of(write_experiment(folder, arms, seeds=range(3 * trial, 3 * trial + 3), world=world))
        interval = score(numbers, "a")["gain_interval"]
        covered += interval["low"] < 0.05 < interval["high"]
        found += difference(numbers, "b", "a")["p"] < 0.05
    # 76 and 4 expected; chance goes beyond these bounds about once in 200 draws
    assert covered >= 71
    assert found <= 9


def test_reaching_most_of_the_best_gain_is_told_in_steps_forwards_and_seconds(reported):
    _, numbers, terminal = reported
    reach = {row["arm"]: row for row in numbers["reach"]}
    best = score(numbers, "aegpo")
    assert numbers["target"] == pytest.approx({"score": best["base"] + 0.8 * best["gain"], "share_of": "aegpo"})
    spent = reach["aegpo"]["spent"]
    assert reach["aegpo"]["reached"] == 3
    assert 0 < spent["steps"]["low"] < spent["steps"]["typical"] < spent["steps"]["high"]
    assert spent["forwards"]["typical"] == pytest.approx(spent["steps"]["typical"] * 580)
    assert spent["seconds"]["typical"] == pytest.approx(spent["steps"]["typical"] * (0.4 + 0.001 + 1.05 + 0.2 + 1.6))
    assert re.search(r"To reach palette 0\.\d+, 80 % of aegpo's gain", terminal)


def test_an_arm_that_never_reaches_the_target_is_said_not_to(tmp_path):
    arms = (GRPO, Arm("weak", {"palette": -0.05, "scene": 0.0}, frozen=1))
    html, numbers, terminal = report(write_experiment(tmp_path, arms))
    (weak,) = [row for row in numbers["reach"] if row["arm"] == "weak"]
    assert weak["reached"] == 0
    assert weak["spent"]["steps"]["by_seed"] == [None, None, None]
    assert weak["spent"]["steps"]["high"] is None
    assert "not reached" in html
    assert "not reached" in terminal
    assert numbers["verdict"][0].endswith(" at equal cost (97,600) alike: weak gained less than grpo.")
    assert {row["arm"]: row["cost"] for row in numbers["costs"]}["weak"] == 40 * (640 + 4 * 600)  # a frozen policy too


def test_a_target_of_the_file_is_what_arms_are_timed_to(tmp_path):
    html, numbers, _ = report(write_experiment(tmp_path, (GRPO, AEGPO), target=0.55))
    assert numbers["target"] == {"score": 0.55, "share_of": None}
    assert "To reach palette 0.550<" in html


@pytest.mark.parametrize("target", [0.2, None])
def test_nothing_is_timed_to_a_score_that_the_base_has(tmp_path, target):
    gain = 0.1 if target else -0.1
    arms = [Arm(name, {"palette": gain}) for name in ("a", "b")]
    html, numbers, _ = report(write_experiment(tmp_path, arms, target=target))
    assert (numbers["target"], numbers["reach"]) == (None, [])
    assert "To reach" not in html
    told = "no arm is timed to the target 0.2 on palette: the base scores 0.4"
    assert [note.startswith(told) for note in numbers["notes"]] == ([True] if target else [])


@pytest.mark.slow
def test_the_comparisons_of_a_file_are_the_ones_that_are_made(tmp_path):
    pairs = [["aegpo", "random-steps"], ["aegpo", "grpo"], ["selection", "grpo"], ["absent", "grpo"], ["late", "aegpo"]]
    write_experiment(tmp_path, ARMS)
    write_run(tmp_path, Arm("late", {"palette": 0.1}), 5, World(), 40)
    arms = [*(arm.name for arm in ARMS), "absent", "late"]
    order = {"arms": arms, "seeds": [*SEEDS, 5], "comparisons": pairs}
    (tmp_path / "order.json").write_text(json.dumps(order))
    html, numbers, terminal = report(tmp_path)
    compared = [(row["arm"], row["reference"]) for row in numbers["contrasts"] if row["label"] == "palette"]
    assert compared == [("aegpo", "random-steps"), ("aegpo", "grpo"), ("selection", "grpo")]
    assert (
        " alike: aegpo gained more than random-steps and grpo. Arms differ on the guard scene." in numbers["verdict"][0]
    )
    assert re.search(
        r"At equal cost \(55,200\), no difference to grpo shows in selection \(\+0\.0\d+ \[-",
        " ".join(numbers["verdict"]),
    )
    notes = [
        "in no comparison that the file names: allocation",
        "absent minus grpo is not compared: no run of absent is finished",
        "late minus aegpo is not compared: they have no finished seed in common",
    ]
    assert numbers["notes"][-3:] == notes
    for note in notes:
        assert note in html
        assert note in terminal


def test_comparisons_of_arms_that_the_folder_does_not_have_are_refused(tmp_path):
    write_experiment(tmp_path, (GRPO, AEGPO), comparisons=[["aegpo", "gpo"]])
    with pytest.raises(
        AegpoError, match=r"order\.json: comparisons\.0\.1: no arm is called 'gpo'; did you mean 'grpo'"
    ):
        read_study(tmp_path)


def test_who_gains_most_and_who_gains_most_at_equal_cost_are_both_told(tmp_path):
    """The dear arm ends higher and is behind where the cheap one ends."""
    dear = Arm("dear", {"palette": 0.12}, forwards=6000, trained_edges=6000)
    cheap = Arm("cheap", {"palette": 0.09}, forwards=600, trained_edges=600)
    _, numbers, _ = report(write_experiment(tmp_path, (dear, cheap), world=World(seed_spread=0.002, noise=0.01)))
    first = "On the trained reward palette, at equal steps (40): cheap gained less than dear."
    assert numbers["verdict"][0] == f"{first} At equal cost (96,000): cheap gained more than dear."
    assert re.match(
        r"Highest gain on palette: dear, \+0\.1\d+; at equal cost: cheap, \+0\.\d+, against \+0\.\d+ of dear",
        numbers["verdict"][1],
    )
    found = numbers["equal_cost"]
    assert (found["cost"], found["arm"]) == (96_000, "cheap")
    gains = {row["arm"]: row["gain"] for row in found["scores"]}
    assert gains["cheap"] == pytest.approx(score(numbers, "cheap")["gain"])
    hand = (1 - np.exp(-3 * 4 / 40)) / (1 - np.exp(-3)) * score(numbers, "dear")["gain"]
    assert gains["dear"] == pytest.approx(hand, abs=0.01)  # 4 of 40 steps, straight between evaluations
    family = [row["p_holm"] for row in (*numbers["contrasts"], *found["contrasts"])]
    single = [row["p"] for row in (*numbers["contrasts"], *found["contrasts"])]
    assert min(family) == pytest.approx(2 * min(single))


def test_an_arm_that_varies_more_than_the_others_is_named(tmp_path):
    write_experiment(
        tmp_path, [Arm(name, {"palette": 0.1}) for name in "abcd"], seeds=range(5), world=World(noise=0.005)
    )
    write_experiment(tmp_path / "loud", [Arm("e", {"palette": 0.1})], seeds=range(5), world=World(seed_spread=0.1))
    (tmp_path / "loud" / "e").rename(tmp_path / "e")
    (tmp_path / "order.json").write_text(json.dumps({"arms": list("abcde"), "seeds": list(range(5))}))
    text = " ".join(numbers_of(tmp_path)["verdict"])
    assert re.search(r"e varies more between seeds than the other arms \(p = 0\.\d+\)", text)
