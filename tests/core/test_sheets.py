"""Tables fit every width: nothing is cut, no word that has room is broken, and plainly each fact is a line."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from aegpo.core.sheets import Sheet, print_sheet
from aegpo.core.terminals import PLAIN, WIDE, console, plain, plainly, say

NUMBERS = Sheet(
    "Costs",
    ("arm", "rollouts", "gradient rows", "work of all"),
    (("grpo", "96", "864", "319,680"), ("allocation", "96", "~164", "81,810-121,410")),
    note="work = what it takes",
)
TEXT = Sheet(
    "",
    ("field", "what it is"),
    (("low", "rollouts of the lower half of all prompts"), ("a_name_of_24_characters_", "-")),
    numbers=False,
)


def printed(sheet: Sheet, width: int) -> str:
    stream = io.StringIO()
    print_sheet(sheet, Console(file=stream, width=width))
    return stream.getvalue()


@pytest.mark.parametrize("sheet", [NUMBERS, TEXT, Sheet("", ("arm", "signals"), (("文字" * 9, "80 + 2,400 once"),))])
def test_at_any_width_nothing_is_cut_and_no_line_is_longer(sheet):
    for width in range(12, 140):
        text = printed(sheet, width)
        assert "…" not in text
        assert max(map(len, text.splitlines())) <= width
        cells = [cell for row in sheet.rows for cell in row if cell != "-"]
        letters = re.sub(r"[^\w]", "", text)
        for word in (word for cell in cells for word in re.findall(r"\w+", cell)):
            assert word in letters or width < 60  # where it may be broken between two lines of a cell


def test_where_there_is_room_every_cell_is_on_one_line():
    text = printed(NUMBERS, 80)
    assert text.splitlines()[0].rstrip() == "Costs"
    assert "┃ arm        ┃ rollouts ┃ gradient rows ┃    work of all ┃" in text
    assert "│ allocation │       96 │          ~164 │ 81,810-121,410 │" in text
    assert text.splitlines()[-1].rstrip() == "work = what it takes"


def test_cells_are_wrapped_at_words_before_anything_else():
    assert re.search(r"┃ +gradient ┃", printed(NUMBERS, 54))
    assert "│ lower half of all" in printed(TEXT, 50)


def test_a_table_of_few_rows_is_turned_round():
    turned = printed(NUMBERS, 49)
    assert "┃ arm           ┃    grpo ┃     allocation ┃" in turned
    assert "│ work of all   │ 319,680 │ 81,810-121,410 │" in turned


def test_columns_that_have_no_room_beside_the_others_go_below_them():
    rows = tuple((f"arm-{number}", *(["1,234,567"] * 4)) for number in range(9))
    text = printed(Sheet("Costs", ("arm", "one", "two", "three", "four"), rows), 40)
    headings = [line.split("┃")[1:-1] for line in text.splitlines() if line.startswith("┃")]
    assert [[cell.strip() for cell in line] for line in headings] == [["arm", "one", "two"], ["arm", "three", "four"]]
    assert text.count("arm-8") == 2
    assert text.count("Costs") == 1


def test_a_table_may_say_the_same_in_fewer_columns():
    narrow = Sheet("", ("key", "arms"), (("tree", "grpo, control"),), numbers=False)
    cells = ["independent"] * 9
    wide = Sheet("", ("key", *cells), (("tree", *cells),), numbers=False, narrow=narrow)
    assert "grpo, control" in printed(wide, 80)
    assert "grpo, control" not in printed(wide, 160)


def test_what_has_no_room_at_all_becomes_a_list():
    sheet = Sheet("Fields", ("field", "default", "unit"), (("name", "x" * 50, "-"),), numbers=False)
    lines = [line.rstrip() for line in printed(sheet, 30).splitlines()]
    assert lines[:2] == ["Fields", "name"]
    assert "".join(line.strip() for line in lines[2:]) == "default:" + "x" * 50
    assert all(line.startswith("  ") for line in lines[2:])


def test_plainly_every_cell_that_says_something_is_a_line(monkeypatch):
    monkeypatch.setenv(PLAIN, "1")
    assert printed(NUMBERS, 20).splitlines() == [
        "Costs",
        "grpo, rollouts: 96",
        "grpo, gradient rows: 864",
        "grpo, work of all: 319,680",
        "allocation, rollouts: 96",
        "allocation, gradient rows: ~164",
        "allocation, work of all: 81,810-121,410",
        "work = what it takes",
    ]
    assert printed(TEXT, 20).splitlines() == ["low, what it is: rollouts of the lower half of all prompts"]


def test_a_sentence_is_wrapped_at_words_and_plainly_is_one_line():
    for inside, lines in ((False, ["one two", "three"]), (True, ["one two three"])):
        stream = io.StringIO()
        to = Console(file=stream, width=9)
        if inside:
            with plainly():
                say(to, "one two three")
        else:
            say(to, "one two three")
        assert [line.rstrip() for line in stream.getvalue().splitlines()] == lines


def test_plain_output_is_asked_for_by_the_option_a_variable_or_the_terminal(monkeypatch):
    monkeypatch.delenv(PLAIN, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    assert not plain(Console(force_terminal=True))
    with plainly():
        assert plain(Console())
        assert Console(force_terminal=True).no_color
    assert not plain(Console())
    monkeypatch.setenv("TERM", "dumb")
    assert plain(Console(force_terminal=True))


def test_without_a_terminal_the_width_is_fixed_unless_columns_says_another(monkeypatch, capsys):
    monkeypatch.delenv("COLUMNS", raising=False)
    assert console().width == WIDE
    monkeypatch.setenv("COLUMNS", "97")
    assert console().width == 97
