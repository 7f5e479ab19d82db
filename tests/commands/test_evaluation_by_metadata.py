"""`aegpo evaluate --by KEY`: a row for each value of a key of the prompts' metadata, and the same scores."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from command_line import aegpo

from aegpo.commands.evaluate import evaluate
from aegpo.commands.evaluate_prompts import styled_prompts
from aegpo.commands.evaluate_request import EvaluateRequest
from aegpo.config.loading import load_experiment_file
from aegpo.errors import AegpoError
from aegpo.models.shapes.captions import KINDS, parse
from aegpo.plugin.manager import load_registries, plugin_manager

SPEC = """
name: small
training_steps: 1
seeds: [0, 1]
device: cpu
model: {{kind: shapes, weights: {weights}}}
prompts: {{train_count: 4, evaluation_count: 7}}
rewards: [palette, {{kind: scene, name: strict, strict: true}}]
rollouts: {{prompts_per_step: 2, rollouts_per_step: 4, denoising_steps: 4, micro_batch: 4}}
optimizer: {{learning_rate: 0.03}}
evaluation: {{images: 2, images_per_prompt: 2, rewards: [diversity]}}
"""
PHOTO, ANIME = "two red circles on a green background", "a green triangle on a blue background"
ROWS = [  # of a list that asks the same of two values, and twice of one
    {"prompt": PHOTO, "style": "photo", "part": 2, "mood": None},
    {"prompt": ANIME, "style": "16:9 anime", "part": 1, "mood": "calm"},
    {"prompt": PHOTO, "style": "photo", "part": 2, "mood": "calm"},
    {"prompt": PHOTO, "style": "16:9 anime", "part": 1.5, "mood": "calm"},
    {"prompt": ANIME, "style": "photo", "part": True, "mood": "calm"},
]


@pytest.fixture
def prompts(tmp_path) -> Path:
    return write(tmp_path / "mine.jsonl", *ROWS)


def write(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def scores(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]


def in_order(values: list) -> list[int]:
    """The places of a list's prompts as rows have them: value by value, as these come first."""
    return sorted(range(len(values)), key=lambda place: values.index(values[place]))


def same_images(by: Path, without: Path, name: str, values: list, styles: list[str]) -> None:
    """Every image of one folder is that of the other, in the folder of its prompt's value."""
    columns = [path.name for path in without.iterdir() if path.is_dir()]
    assert {"base", "base-2"} <= set(columns)
    seen = dict.fromkeys(styles, 0)
    for place, value in enumerate(values):
        for column in columns:
            image = (by / column / value / f"{seen[value]:05d}.jpg").read_bytes()
            assert image == (without / column / name / f"{place:05d}.jpg").read_bytes()
        seen[value] += 1
    for column in columns:
        assert {path.name: len(list(path.iterdir())) for path in (by / column).iterdir()} == seen


def same_row_of_all(by, without) -> None:
    every = [line for line in by.lines if line.style == "all"]
    assert [line.reward for line in every] == [line.reward for line in without.lines]
    for line, other in zip(every, without.lines, strict=True):
        assert line.prompts == other.prompts
        for field in ("base", "policy", "gain", "better"):
            assert getattr(line, field) == pytest.approx(getattr(other, field), rel=1e-12, abs=1e-12)
        for field in ("base_interval", "gain_interval"):
            one, two = getattr(line, field), getattr(other, field)
            assert (one.low, one.high) == pytest.approx((two.low, two.high), rel=1e-9, abs=1e-12)


def test_held_out_captions_have_a_row_for_each_kind_and_the_scores_that_they_have_without_it(arm, tmp_path):
    request = EvaluateRequest(arm, out=tmp_path / "without")
    without, plain = evaluate(request)
    by, found = evaluate(replace(request, by="kind", out=tmp_path / "by"))
    labels = ["palette", "strict", "diversity"]
    assert [(line.reward, line.style) for line in found.lines] == [
        (label, style) for label in labels for style in (*KINDS, "all")
    ]
    assert [line.prompts for line in found.lines[:5]] == [2, 2, 2, 1, 7]
    same_row_of_all(found, plain)
    rows, listed = scores(by), scores(without)
    kinds = [parse(row["prompt"]).kind for row in listed]
    assert [row["style"] for row in rows] == [kinds[place] for place in in_order(kinds)]
    assert [{**row, "style": "held-out"} for row in rows] == [listed[place] for place in in_order(kinds)]  # every bit
    same_images(by, without, "held-out", kinds, list(KINDS))
    one, two = (json.loads((folder / "summary.json").read_text()) for folder in (by, without))
    assert (one["by"], two["by"]) == ("kind", None)
    assert {key for key in one if one[key] != two[key]} == {"by", "scores"}
    assert "held-out prompts, by kind" in (by / "index.html").read_text()


def test_prompts_of_a_file_that_are_asked_twice_keep_their_noise(arm, prompts, tmp_path):
    request = EvaluateRequest(arm / "seed-0", ("palette", "diversity"), str(prompts), out=tmp_path / "without")
    without, plain = evaluate(request)
    by, found = evaluate(replace(request, by="style", out=tmp_path / "by"))
    values = [row["style"] for row in ROWS]
    assert [line.style for line in found.lines] == ["photo", "16:9 anime", "all"] * 2
    same_row_of_all(found, plain)
    listed = scores(without)
    assert listed[0]["base"] != listed[2]["base"]  # the same prompt, another noise
    assert [{**row, "style": "mine"} for row in scores(by)] == [listed[place] for place in in_order(values)]
    same_images(by, without, "mine", values, ["photo", "16:9 anime"])


def test_numbers_are_values_too_and_a_model_alone_has_rows(experiment, prompts, tmp_path):
    request = EvaluateRequest(experiment, ("palette",), str(prompts), by="part", out=tmp_path / "out")
    out, found = evaluate(request)
    assert [(line.style, line.prompts) for line in found.lines] == [
        ("2", 2), ("1", 1), ("1.5", 1), ("true", 1), ("all", 5)
    ]  # fmt: skip
    assert {path.name for path in (out / "base").iterdir()} == {"2", "1", "1.5", "true"}


def test_one_value_is_one_row(experiment, tmp_path):
    file = write(tmp_path / "one.jsonl", *({"prompt": text, "style": "x"} for text in (PHOTO, ANIME)))
    _, found = evaluate(EvaluateRequest(experiment, ("palette",), str(file), by="style", out=tmp_path / "out"))
    assert [line.style for line in found.lines] == ["x"]


def test_the_sheet_has_no_more_prompts_than_without_it(experiment, tmp_path):
    file = write(tmp_path / "many.jsonl", *({"prompt": PHOTO, "number": number} for number in range(20)))
    request = EvaluateRequest(experiment, ("palette",), str(file), 1, out=tmp_path / "without")
    pages = [evaluate(request)[0], evaluate(replace(request, by="number", out=tmp_path / "by"))[0]]
    one, two = (re.search(r"base64,([^\"]+)", (page / "index.html").read_text()) for page in pages)
    assert one is not None
    assert two is not None
    assert one[1] == two[1]  # the first twelve, each alone in its row there


def test_the_command_prints_a_column_that_is_called_as_the_key(experiment, tmp_path):
    words = ["evaluate", str(experiment), "--rewards", "palette", "--by", "kind", "--out", str(tmp_path / "out")]
    done = aegpo(*words)
    assert done.code == 0, done.stderr
    assert re.search(r"^ *kind +prompts +score", done.stdout, re.MULTILINE)
    for row in (*KINDS, "all"):
        assert re.search(rf"^ *{row} +\d +0\.\d+", done.stdout, re.MULTILINE)


# --- what is refused -------------------------------------------------------------------------------------------------


def refused(request: EvaluateRequest) -> str:
    with pytest.raises(AegpoError) as error:
        evaluate(request)
    assert request.out is not None
    assert not request.out.exists()
    return str(error.value)


def test_a_prompt_without_the_key_is_named_with_its_place(experiment, prompts, tmp_path):
    request = EvaluateRequest(experiment, ("palette",), str(prompts), by="mood", out=tmp_path / "out")
    has = "but this prompt has only 'style', 'part'"
    assert refused(request) == f"{prompts}, line 1: --by mood needs 'mood', {has}"
    told = refused(replace(request, prompts=None, by="style"))
    assert re.fullmatch(r"prompt '.+': --by style needs 'style', but this prompt has only 'kind'", told)
    (tmp_path / "bare.txt").write_text("a red circle\n")
    told = refused(replace(request, prompts=str(tmp_path / "bare.txt")))
    assert told.endswith("bare.txt, line 1: --by mood needs 'mood', but this prompt has no metadata")


def test_held_out_prompts_of_a_file_are_named_with_their_lines(experiment, tmp_path):
    rows = [ROWS[0], {"prompt": ANIME, "mood": "calm"}, {"prompt": "a red circle"}]
    file = write(tmp_path / "held-out.jsonl", *rows)
    chosen = (f"prompts.evaluation={file}", "prompts.evaluation_count=2")
    request = EvaluateRequest(experiment, ("palette",), by="style", out=tmp_path / "out", overrides=chosen)
    assert refused(request) == f"{file}, line 2: --by style needs 'style', but this prompt has only 'mood'"
    chosen = (f"prompts.evaluation={file}", "prompts.evaluation_count=1")
    evaluate(replace(request, overrides=chosen))  # what is not evaluated needs no value


def test_the_benchmark_has_styles_of_its_own(experiment, tmp_path):
    request = EvaluateRequest(experiment, ("palette",), "hpsv2", by="kind", out=tmp_path / "out")
    assert refused(request) == (
        "--by kind sorts prompts by their metadata, but those of --prompts hpsv2 have none and a row for each style "
        "already; leave --by out"
    )


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (["a"], '["a"] is no text or number'),
        ({"a": 1}, '{"a": 1} is no text or number'),
        ("", '"" is empty'),
        ("  ", '"  " is blank'),
        (" a", '" a" begins or ends with a space'),
        ("a\nb", '"a\\nb" has letters that no table can show'),
        ("a/b", '"a/b" has a slash'),
        ("a\\b", '"a\\\\b" has a slash'),
        ("..", '".." begins with a dot'),
        (".a", '".a" begins with a dot'),
        ("é" * 51, "... is longer"),
        ("all", '"all" is what the row of all prompts is called'),
    ],
)
def test_a_value_that_can_name_no_folder_is_refused_with_its_line(experiment, tmp_path, value, why):
    file = write(tmp_path / "mine.jsonl", {"prompt": PHOTO, "style": "é" * 50}, {"prompt": ANIME, "style": value})
    told = refused(EvaluateRequest(experiment, ("palette",), str(file), by="style", out=tmp_path / "out"))
    begin = f"{file}, line 2: --by style makes a row and a folder of each value, but "
    assert told.startswith(begin)
    assert f"{why}; texts and numbers of at most 100 bytes, without slashes or a dot in front, can be values" in told


@pytest.mark.parametrize(("one", "two"), [("Photo", "photo"), (1, "1"), (True, "true"), ("straße", "STRASSE")])
def test_values_that_may_be_one_folder_are_refused_with_both_lines(experiment, tmp_path, one, two):
    rows = [{"prompt": PHOTO, "style": value} for value in (one, one, two)]
    file = write(tmp_path / "mine.jsonl", *rows)
    told = refused(EvaluateRequest(experiment, ("palette",), str(file), by="style", out=tmp_path / "out"))
    assert told == (
        f"{file}, line 3: --by style makes a folder of each value, but {json.dumps(two)} and {json.dumps(one)}, of "
        f"{file}, line 1, may be one folder; write both the same, or call one otherwise"
    )


def test_a_number_that_is_none_is_no_value(experiment, tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    file = tmp_path / "mine.parquet"
    parquet.write_table(arrow.table({"prompt": [PHOTO, ANIME], "part": [0.5, float("nan")]}), file)
    registries = load_registries(plugin_manager())
    request = EvaluateRequest(experiment, prompts=str(file), by="part")
    with pytest.raises(AegpoError, match=r"mine.parquet, row 1: --by part makes .*, but NaN is no text or number"):
        styled_prompts(request, load_experiment_file(experiment, registries).arms["main"], ())
