"""Bars in terminals of all sizes: bar and time left are always there, scores where there is room."""

from __future__ import annotations

import io
import re

import pytest
from rich.cells import cell_len
from rich.console import Console

from aegpo.core.terminals import plainly
from aegpo.runs.bar_rows import BarRow, BarRows
from aegpo.runs.progress import Bars, Lines, Standing, display

STANDING = Standing(30, 175, 0.4123, 123_456, 25, {"strict": 0.4, "weighted sum": 0.25, "palette": 0.125})
STEERING = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


def shown(width: int, height: int, runs: int, label: str = "aegpo seed {}") -> list[str]:
    """What is on the screen, line by line, once every run was shown."""
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=width, height=height, color_system=None)
    with display(console, every_step=False, runs=runs) as bars:
        for number in range(runs):
            bars.show(label.format(number), STANDING)
        frame = stream.getvalue().rpartition("\x1b[2K")[2]
    return STEERING.sub("", frame).splitlines()


@pytest.mark.parametrize("label", ["aegpo seed {}", "selection-noisiest {}", "a-name-that-takes-half-the-screen-{}"])
def test_at_80_columns_bar_and_time_left_are_whole(label):
    lines = shown(80, 24, 3, label)
    assert max(map(cell_len, lines)) <= 80
    text = "\n".join(lines)
    assert "…" not in text
    assert len(re.findall(r"━+.* 30/175 eta -:--:--", text)) == 3
    assert "evaluation" not in text


def test_with_room_the_scores_are_there_too():
    line = shown(200, 24, 1)[0]
    assert line.endswith("reward 0.412  forwards 123,456  evaluation strict 0.400, weighted sum 0.250, palette 0.125")
    assert shown(80, 24, 1)[0].endswith("eta -:--:-- reward 0.412")
    assert shown(60, 24, 1)[0].endswith("eta -:--:--")


@pytest.mark.parametrize("width", range(37, 200, 7))
def test_no_line_is_longer_than_any_terminal_and_nothing_is_cut(width):
    lines = shown(width, 24, 2)
    assert max(map(cell_len, lines)) <= width
    assert "…" not in "".join(lines)
    assert "".join(lines).count("eta -:--:--") == 3  # one for all runs


def test_more_bars_than_the_terminal_has_lines_are_counted():
    lines = shown(80, 24, 40)
    assert len(lines) == 22
    assert lines[0].startswith("all runs")
    assert lines[-1].strip() == "and 20 more"


def test_a_total_that_is_not_known_is_a_question():
    stream = io.StringIO()
    Console(file=stream, width=80).print(BarRows([BarRow("all runs", 0, None, "-:--:--")]))
    assert "0/? eta -:--:--" in stream.getvalue()


def test_plain_output_has_lines_instead_of_bars():
    terminal = Console(file=io.StringIO(), force_terminal=True)
    assert isinstance(display(terminal, every_step=False), Bars)
    with plainly():
        assert isinstance(display(terminal, every_step=False), Lines)
