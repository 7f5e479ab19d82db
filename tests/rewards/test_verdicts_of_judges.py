"""Which answers of a model are a grade or a choice, and which are asked for again."""

from __future__ import annotations

import pytest

from aegpo.rewards.verdicts import read_choice, read_grade

GRADES = {
    "7": 7,
    "7/10": 7,
    "7 / 10.": 7,
    "7 out of 10.": 7,
    "7, out of 10.0": 7,
    "10 out of 10": 10,
    "0/10": 0,
    "Grade: 7.": 7,
    "**8.5**": 8.5,
    "v2 is 3": 3,
    "7,5": 7.5,
    "7,5/10": 7.5,
    "Grade: 8 (on a scale from 0 to 10)": 8,
    "Grade (0-10): 8": 8,
    "between 0 and 10 it is 8": 8,
    "on a scale of 10: 8": 8,
    "I count 2 of 3.\n\n8\n```\n": 8,
    '{"grade": 8}': 8,
}
NO_GRADES = ["", "eight", "-0.5 or so", "1.2.3", "12", "nan", "1e1", "8th", "8%", "80 %", ".5", "minus 3", "\u22123"]
NO_GRADES += ["7, 8", "8-10", "0-10", "from 0 to 10", "4/5", "80/100", "3 of 10", "8/10 (80%)", "8 out of 100"]
NO_GRADES += ["7,500", "8\nI hope that helps", "1-5: 4", "8pts, 2 missing", "7\u00bd", "8\u00b2", "9" * 2000]


@pytest.mark.parametrize("answer", GRADES)
def test_the_grade_is_the_one_number_of_the_last_line_without_its_scale(answer):
    assert read_grade(answer, 0, 10) == GRADES[answer]


@pytest.mark.parametrize("answer", NO_GRADES)
def test_none_or_several_or_one_of_another_scale_is_no_grade(answer):
    assert read_grade(answer, 0, 10) is None


def test_the_scale_is_the_one_that_was_asked_for():
    assert read_grade("-0,5 from -1 to 1", -1, 1) == -0.5
    assert read_grade("\u22120.5", -1, 1) == -0.5
    assert read_grade("3 (1-5)", 1, 5) == 3
    assert read_grade("3 (1-5)", 0, 5) is None
    assert read_grade("7,500", 0, 10_000) is None  # seven and a half, or thousands


CHOICES = {
    "A": 1.0,
    "**B**.": 0.0,
    "Tie": 0.5,
    "Answer: B": 0.0,
    "Picture A": 1.0,
    "I prefer (A).": 1.0,
    "The better picture is B": 0.0,
    "A is bright, B is dark.\nFinal answer: TIE": 0.5,
    '{"choice": "A"}': 1.0,
}
NO_CHOICES = [
    "",
    "A red circle is in both.",
    "A circle is in B",
    "A is better",
    "A or B",
    "A tie",
    "a",
    "A/B",
    "A\nwell",
]
NO_CHOICES += ["Not A", "The worse one is A", "B is better than A", "I would not choose A", "BA", "It is a tie"]


@pytest.mark.parametrize("answer", CHOICES)
def test_the_choice_is_the_word_that_ends_the_last_line(answer):
    assert read_choice(answer) == CHOICES[answer]


@pytest.mark.parametrize("answer", NO_CHOICES)
def test_an_article_or_a_letter_that_may_mean_the_other_is_no_choice(answer):
    assert read_choice(answer) is None
