"""The verdict in plain words says what its tables say: no sentence contradicts one, whatever the numbers are."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from studies import ARMS, GRPO, Arm, World, report, write_experiment

from aegpo.report.contrasts import Contrast
from aegpo.report.glance import glance_tables
from aegpo.report.in_numbers import in_numbers
from aegpo.report.outcomes import called, differs, holds, outcome, places_of
from aegpo.report.scores import EqualCost, Score
from aegpo.report.statistics import Interval
from aegpo.report.summary import Cost, Summary
from aegpo.report.verdict import plainly

PAIRS = (("b", "a"), ("c", "a"), ("c", "b"))
LABELS = {"weighted sum": True, "part": True, "guard-one": False, "guard-two": False}


@st.composite
def comparisons(draw, label, pair):
    """A comparison with any mean, and p and interval that fit each other; or of one seed, untested."""
    mean = draw(st.sampled_from([-0.2, -0.01, 0.01, 0.2]))
    untested = Contrast(label, *pair, (0,), (mean,), mean, 0.05)
    if draw(st.booleans()) and draw(st.booleans()):
        return untested
    p = draw(st.sampled_from([1e-6, 0.01, 0.03, 0.049, 0.2, 1.0]))
    corrected = min(1.0, p * draw(st.integers(1, 6)))
    width = abs(mean) * (0.5 if p < 0.05 else 2)
    around = Interval(mean - width, mean + width)
    equal = draw(st.sampled_from([None, 0.001, 0.5]))
    tested = {"df": 4, "over_seeds": around, "over_both": around, "p": p, "p_holm": corrected}
    tested |= {"p_equal": equal, "p_equal_holm": equal, "smallest_detectable": 0.1, "detectable_range": around}
    return replace(untested, seeds=(0, 1, 2), by_seed=(mean,) * 3, **tested)


@st.composite
def summaries(draw):
    def every():
        return tuple(draw(comparisons(label, pair)) for label in LABELS for pair in PAIRS)

    scores = tuple(
        Score(arm, label, trained, (0, 1, 2), 0.5, 0.6, 0.1, (0.1,) * 3, Interval(0.05, 0.15))
        for label, trained in LABELS.items()
        for arm in "abc"
    )
    costs = tuple(Cost(arm, (0, 1, 2), 40, 10, 0, 10, 40, 1.0, 1, 1, {}, None) for arm in "abc")
    equal = EqualCost(20.0, "a", scores, every()) if draw(st.booleans()) else None
    named = {"about": {}, "controls": (("c", "b"),), "prompts": 8, "headline": "weighted sum", "margin": None}
    found = {"scores": scores, "contrasts": every(), "equal_cost": equal, "uneven": None, "costs": costs}
    rest = {"signals": (), "noise": (), "target": None, "reach": (), "notes": ()}
    return Summary(name="made up", arms=("a", "b", "c"), seeds=(0, 1, 2), **named, **found, **rest)


@given(summaries())
def test_whatever_differs_is_named_in_the_headline_and_no_difference_is_denied(summary):
    first, *rest = plainly(summary)
    for place in places_of(summary):
        for each in place.contrasts:
            if differs(each) and each.label != summary.headline:
                assert called(summary, each.label) in first
            if differs(each):
                word = "more" if each.mean > 0 else "less"
                of_label = [line for line in (first, *rest) if line.startswith(f"On {called(summary, each.label)}, ")]
                assert any(each.arm in line and f"gained {word} than" in line for line in of_label)
    ends = [place.compared(summary.headline) for place in places_of(summary)]
    denied = first.count("no difference that")
    assert denied <= sum(not any(differs(each) for each in end) for end in ends)
    assert len(ends) > 1 or not denied or not any(holds(each) for each in ends[0])


@given(summaries())
def test_what_is_said_of_a_control_is_what_the_table_shows(summary):
    told = next((line for line in plainly(summary) if line.startswith("c against its control, b: ")), "")
    for place in places_of(summary):
        for each in place.contrasts:
            word = outcome(each)
            if (each.arm, each.reference) != ("c", "b") or word is None:
                continue
            part = next((part for part in told.split("; ") if f"on {called(summary, each.label)}, " in part), None)
            assert part is not None or (each.label == "part" and not differs(each))
            if part is not None and differs(each):
                assert f"it gained {'more' if each.mean > 0 else 'less'}" in part


@given(summaries())
def test_the_table_at_a_glance_has_the_word_of_every_comparison(summary):
    tables = list(glance_tables(summary))
    shown = [cell for table in tables for row in table.rows for cell in row[2:]]
    tested = [place for place in places_of(summary) if any(each.p is not None for each in place.contrasts)]
    words = [outcome(each) for place in tested for each in place.contrasts]
    assert sorted(cell.rpartition(" ")[0] for cell in shown) == sorted(word or "" for word in words)
    for sentence in in_numbers(summary):
        assert "None" not in sentence


def test_a_guard_that_differs_is_in_the_headline_although_what_was_trained_does_not(tmp_path):
    arms = (Arm("a", {"palette": 0.05, "scene": 0.0}), Arm("b", {"palette": 0.05, "scene": -0.1}))
    html, numbers, _ = report(write_experiment(tmp_path, arms, world=World(noise=0.01)))
    first = numbers["verdict"][0]
    assert first.endswith("no difference that these 3 seeds can resolve. But arms differ on the guard scene.")
    assert ": b gained less than a." in numbers["verdict"][1]
    assert "less -0." in html


@pytest.mark.slow
def test_arms_are_told_in_a_sentence_and_against_their_controls(tmp_path):
    about = {"grpo": "the reference, <as published>", "aegpo": "looks at entropy"}
    folder = write_experiment(tmp_path, ARMS, about=about, controls={"aegpo": "random-steps"})
    html, numbers, _ = report(folder)
    assert numbers["about"] == about
    assert "the reference, &lt;as published&gt;" in html
    told = (
        "aegpo against its control, random-steps: on the trained reward palette, it gained more, at equal steps and at"
    )
    assert any(line.startswith(told) for line in numbers["verdict"])
    assert "random-steps, its control" in html
    assert "<dt>Control</dt>" in html


def test_a_run_without_an_order_file_has_the_words_of_its_manifest(tmp_path):
    folder = write_experiment(tmp_path, (GRPO,), order=False)
    for path in folder.glob("grpo/seed-*/manifest.json"):
        manifest = json.loads(path.read_text())
        manifest["experiment"]["about"] = "as it was begun"
        path.write_text(json.dumps(manifest))
    _, numbers, _ = report(folder)
    assert numbers["about"] == {"grpo": "as it was begun"}


def test_one_seed_has_no_columns_of_what_is_not_possible(tmp_path):
    html, _, terminal = report(write_experiment(tmp_path, ARMS, seeds=(0,)))
    assert "not possible" not in html.replace("no interval over seeds is possible", "")
    assert "not possible" not in terminal
    assert "With 1 seed nothing is tested." in html
    assert "The verdict at a glance" not in html


def test_noise_that_no_step_left_is_left_out(tmp_path):
    class Still(float):
        def __add__(self, _):
            return 0.0

    html, numbers, _ = report(write_experiment(tmp_path, (replace(GRPO, noise=Still()),)))
    assert numbers["noise"] == []
    assert "Noise left" not in html


def test_the_glossary_explains_only_what_the_page_has(reported, tmp_path):
    html, _, _ = reported
    assert "<dt>Attention entropy</dt>" in html
    alone, _, _ = report(write_experiment(tmp_path, (GRPO,)))
    for term in ("Control", "Reference", "Equal cost", "p (Holm)", "Attention entropy"):
        assert f"<dt>{term}</dt>" not in alone
    assert "<dt>Guard</dt>" in alone
