"""A file of one long line, as one that was written as JSON, is shown around what is wrong in it, and no further."""

from __future__ import annotations

import json

import pytest
import yaml
from command_line import aegpo
from repository import ROOT

from aegpo.config.marks import Mark


@pytest.fixture(scope="module")
def document():
    return yaml.safe_load((ROOT / "experiments" / "baselines.yaml").read_text())


def shown(tmp_path, document, **changes):
    path = tmp_path / "json.yaml"
    path.write_text(json.dumps(document | changes, default=str))
    done = aegpo("check", str(path))
    assert done.code == 2
    return done.stderr.splitlines()


def test_the_window_holds_what_is_wrong_and_the_caret_points_at_it(tmp_path, document):
    lines = shown(tmp_path, document, rollouts=document["rollouts"] | {"prompts_per_step": "many"})
    row, caret = lines[-2:]
    assert "must be a whole number, not 'many'" in lines[-3]
    assert row.startswith("  ...")
    assert row.endswith("...")
    assert row[caret.index("^") :].startswith('"many"')


def test_no_line_of_it_is_wider_than_a_terminal(tmp_path, document):
    lines = shown(tmp_path, document, rollouts=document["arms"])  # 14 mistakes
    places = [index for index, line in enumerate(lines) if line.strip() == "^"]
    assert len(places) == len(document["arms"])
    assert all(len(line) <= 80 for index in places for line in lines[index - 1 : index + 1])


@pytest.mark.parametrize("column", [1, 2, 40, 75, 500, 998, 999, 1000, 1001])
def test_wherever_it_is_the_place_is_in_the_window(column):
    text = "".join(chr(0x100 + index) for index in range(1000))
    row, caret = Mark("x.yaml", 1, column, text).caret.splitlines()
    place = caret.index("^")
    assert len(row) <= 76
    assert len(caret) <= 77
    if column <= 1000:  # else it is the end of the text
        assert row[place] == text[column - 1]
    assert row.startswith("  ...") == (column > 38)
    assert row.endswith("...") == (column < 960)


def test_a_line_of_common_length_is_shown_whole():
    text = "rewards: [palette]  # " + "x" * 130
    assert Mark("x.yaml", 1, 11, text).caret == f"  {text}\n            ^"
