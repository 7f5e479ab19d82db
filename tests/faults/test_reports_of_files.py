"""Files of prompts that people reported against programs of this kind, and their like, through the command line.

Each is read as what it is, or refused with its name, the place and what would be right; what is not used is told.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from warm import Ended

FOUR = ("a red circle", "two blue squares", "a green square", "a blue circle")
HELD_OUT = {"evaluation_count": 4}


@pytest.fixture
def run(warm, write_experiment, tmp_path):
    """`run(train=...)` runs the tiny experiment with these prompts."""

    def run(command: str = "run", **prompts: Any) -> Ended:
        path = write_experiment(prompts={**HELD_OUT, **prompts}, training_steps=2)
        words = ["--no-report"] if command == "run" else []
        return warm([command, path.name, "--out", "out", *words], tmp_path)

    return run


def asked(folder: Path) -> set[str]:
    """The prompts that a run trained on."""
    rows = [json.loads(line) for file in folder.rglob("metrics.jsonl") for line in file.read_text().splitlines()]
    return {prompt for row in rows for prompt in row.get("prompts", ())}


def rows(*values: Any, ascii: bool = True) -> str:
    return "".join(json.dumps({"prompt": value}, ensure_ascii=ascii) + "\n" for value in values)


# --- datasets --------------------------------------------------------------------------------------------------------


def test_null_in_a_dataset(run, tmp_path):
    """A blank cell became the word "None"; here its row is left out, and that is told."""
    pytest.importorskip("datasets")
    (tmp_path / "ds").mkdir()
    (tmp_path / "ds" / "train.jsonl").write_text(rows(FOUR[0], None, *FOUR[1:3]) * 2)
    done = run(train={"dataset": "./ds"})
    assert (done.code, done.traceback) == (0, False), done.out
    assert "2 of 8 rows have no prompt and are left out" in done.out
    assert "3 of 8 rows repeat a prompt and are left out" in done.out
    assert "None" not in "".join(file.read_text() for file in (tmp_path / "out").rglob("*.jsonl"))


@pytest.mark.parametrize("value", [["a red circle", "one red disc"], 7, {"text": "a red circle"}, True])
def test_list_in_a_dataset(run, tmp_path, value):
    """A list became its repr; what is no text is refused with its row."""
    pytest.importorskip("datasets")
    (tmp_path / "ds").mkdir()
    (tmp_path / "ds" / "train.jsonl").write_text(rows(value) * 4)
    done = run(train={"dataset": "./ds"})
    assert (done.code, done.traceback) == (2, False), done.out
    assert "row 0 has " in done.error
    assert "a text was expected" in done.error


# --- lines -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e"])
def test_line_separator_inside_json(run, tmp_path, mark):
    """A line was cut where no newline is; only a newline ends a line."""
    lines = (json.dumps({"prompt": text, "note": f"hello{mark}world"}, ensure_ascii=False) for text in FOUR)
    if mark < " ":  # which JSON does not allow as it is
        lines = (json.dumps({"prompt": text, "note": "hello"}) + mark for text in FOUR)
    (tmp_path / "p.jsonl").write_text("\n".join(lines), encoding="utf-8", newline="")
    done = run(train="p.jsonl")
    assert done.code == (2 if mark < " " else 0), done.out
    assert not done.traceback
    assert done.code == 0 or "p.jsonl, line 1 is not JSON" in done.out


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_a_prompt_a_line_whatever_ends_it(run, tmp_path, ending):
    (tmp_path / "p.txt").write_text(ending.join(FOUR), newline="")
    assert run(train="p.txt").code == 0


# --- kinds of file ---------------------------------------------------------------------------------------------------

FORMATS = {
    "ndjson": ("p.ndjson", rows(*FOUR)),
    "csv_with_a_header": ("p.csv", "prompt,category\na red circle,plain\ntwo blue squares,count\n"),
    "tsv_with_a_header": ("p.tsv", "prompt\tcategory\na red circle\tplain\ntwo blue squares\tcount\n"),
    "csv_of_a_spreadsheet": ("p.csv", '\ufeffcategory,prompt\r\n"a, b",a red circle\r\n,two blue squares\r\n'),
    "no_ending": ("prompts", "a red circle\ntwo blue squares\n"),
    "capitals": ("P.TXT", "a red circle\ntwo blue squares\n"),
}


@pytest.mark.parametrize("case", FORMATS)
def test_a_file_of_another_kind_is_read_as_what_it_is(run, tmp_path, case):
    name, text = FORMATS[case]
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    done = run(train=name)
    assert done.code == 0, done.out


def test_parquet(run, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"prompt": FOUR, "category": [1, 2, 3, 4]}), tmp_path / "p.parquet")
    done = run(train="p.parquet")
    assert done.code == 0, done.out


UTF_16 = "a red circle\ntwo blue squares\n".encode("utf-16")
REFUSED = {
    "header_in_capitals": ("p.tsv", b"Prompt\tCategory\na red circle\tplain\n", "line 1", "rename 'Prompt'"),
    "csv_without_a_header": ("p.csv", b"a red circle,plain\ntwo blue squares,count\n", "line 1", "column 'prompt'"),
    "csv_with_semicolons": ("p.csv", b"prompt;category\na red circle;plain\n", "line 1", "between commas"),
    "csv_of_a_blank_cell": ("p.csv", b"prompt,category\na red circle,plain\n,count\n", "line 3", "fill it in"),
    "null_in_lines": ("p.jsonl", rows(FOUR[0], None).encode(), "line 2", "a text"),
    "list_in_lines": ("p.jsonl", rows(FOUR[0], ["a"]).encode(), "line 2", "a text"),
    "json_lines_named_json": ("p.json", rows(*FOUR).encode(), "line 2", ".jsonl"),
    "a_list_named_jsonl": ("p.jsonl", json.dumps(FOUR, indent=1).encode(), "line 1", ".json file"),
    "utf_16": ("p.txt", UTF_16, "line 1", "save it as UTF-8"),
    "utf_16_csv": ("p.csv", "prompt\ta\n".encode("utf-16-le"), "line 1", "save it as UTF-8"),
    "latin_1": ("p.txt", b"a red circle\na caf\xe9\n", "line 2", "save it as UTF-8"),
    "old_line_ends": ("p.txt", b"a red circle\ra blue circle\r", "line 1", "newlines"),
    "spreadsheet": ("p.xlsx", b"PK\x03\x04", ".xlsx", ".csv"),
    "packed": ("p.jsonl.gz", b"\x1f\x8b", ".gz", ".jsonl"),
    "bytes": ("p.txt", bytes(range(256)), "line 1", "save it as UTF-8"),
    "not_parquet": ("p.parquet", b"PAR1" + bytes(100) + b"PAR1", "p.parquet", "write it anew"),
    "depth": ("p.jsonl", b"[" * 200_000, "line 1", "32 deep"),
    "empty": ("p.csv", b"", "p.csv", "'prompt'"),
    "only_a_header": ("p.csv", b"prompt,category\n", "p.csv", "one a row"),
    "gone": ("", b"", "none.txt", "No such file"),
}


@pytest.mark.parametrize("command", ["check", "run"])
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_refused_with_its_name_its_place_and_the_way_out(run, tmp_path, case, command):
    name, content, place, way = REFUSED[case]
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    if name:
        (tmp_path / name).write_bytes(content)
    done = run(command, train=name or "none.txt")
    assert (done.code, done.traceback) == (2, False), done.out
    assert "sentence" not in done.out  # of the embedded world: another line is at fault
    for words in (name or "none.txt", place, way, "tiny.yaml:"):
        assert words in done.error, done.out


# --- what is not used ------------------------------------------------------------------------------------------------


def many() -> list[str]:
    counts, colours = ("a", "two", "three", "four"), ("red", "green", "blue", "yellow", "purple")
    shapes = ("circle", "square", "triangle")
    return [f"{n} {c} {s}{'' if n == 'a' else 's'}" for n in counts for c in colours for s in shapes]


@pytest.mark.parametrize("command", ["check", "run"])
def test_own_file_longer_than_train_count(run, tmp_path, command):
    """The first lines were taken, silently; now `check` and `run` tell how many are not used."""
    (tmp_path / "p.txt").write_text("\n".join(many()) + "\n")
    held_out = {"evaluation": "e.txt", "evaluation_count": 1, "shared": "drop"}
    (tmp_path / "e.txt").write_text("a red circle\ntwo red circles\n")
    done = run(command, train="p.txt", train_count=12, **held_out)
    assert done.code == 0, done.out
    told = " ".join(done.out.split())
    assert "prompts.train_count: only the first 12 of 59 prompts of" in told
    assert "1 of 60 prompts of" in told
    assert "prompts.evaluation_count: only the first 1 of 2 prompts of" in told


def test_prompts_that_occur_twice_are_told(run, tmp_path):
    (tmp_path / "p.txt").write_text("\n".join([*FOUR, FOUR[1]]) + "\n")
    done = run(train="p.txt")
    assert done.code == 0, done.out
    assert "1 of 5 prompts" in done.out
    assert "line 5, which is line 2 again" in done.out
