"""Prompts from text and JSON files and from datasets."""

from __future__ import annotations

import datetime
import json

import numpy as np
import pytest
from worlds import GaussianSpec, small_experiment

from aegpo.core.records import Prompt
from aegpo.core.sections import DatasetPrompts, PromptsSpec
from aegpo.errors import AegpoError
from aegpo.prompts.curricula import Shuffle
from aegpo.prompts.datasets import read_dataset
from aegpo.prompts.files import read_file
from aegpo.prompts.lists import read_prompts


def test_other_keys_of_a_json_line_are_metadata(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": " a cat ", "style": "photo"}\n\n"a dog"\n')
    assert [(each.index, each.text, each.metadata) for each in read_file(path)] == [
        (0, "a cat", {"style": "photo"}),
        (1, "a dog", {}),
    ]


def test_a_json_file_is_a_list(tmp_path):
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps(["a cat", {"prompt": "a dog"}]))
    assert [each.text for each in read_file(path)] == ["a cat", "a dog"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", '{"prompt": "a"}\n{', "x.jsonl, line 2 is not JSON: "),
        ("x.jsonl", '{"text": "a"}', "x.jsonl, line 1 has the keys text; a text, or an object with a text under "),
        ("x.json", '{"prompt": "a"}', "x.json holds a dict; a list of prompts was expected"),
        ("x.json", "[3]", "x.json, item 0 is 3; a text, or an object"),
    ],
)
def test_a_file_that_is_not_prompts_is_refused_at_its_place(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(AegpoError) as error:
        read_file(tmp_path / name)
    assert message in str(error.value)


def test_held_out_prompts_are_dropped_from_training_if_asked(tmp_path):
    (tmp_path / "train.txt").write_text("a cat\na dog\na bird\n")
    (tmp_path / "held.txt").write_text("a dog\n")
    prompts = PromptsSpec(train=tmp_path / "train.txt", evaluation=tmp_path / "held.txt", shared="drop")
    kept = read_prompts(small_experiment(GaussianSpec(), prompts=prompts), "train")
    assert kept == (Prompt(0, "a cat"), Prompt(1, "a bird"))  # by their place among those that are left


def test_a_dataset_in_a_folder_gives_each_prompt_once(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    (tmp_path / "data").mkdir()
    rows = [{"prompt": text, "id": number} for number, text in enumerate(("a cat", "a dog", "a cat"))]
    (tmp_path / "data" / "train.json").write_text(json.dumps(rows))
    source = DatasetPrompts(dataset=str(tmp_path / "data"), file="train.json")
    assert read_dataset(source).prompts == (Prompt(0, "a cat", {"id": 0}), Prompt(1, "a dog", {"id": 1}))
    with pytest.raises(AegpoError, match="has no column 'text'; it has prompt, id"):
        read_dataset(source.model_copy(update={"column": "text"}))
    with pytest.raises(AegpoError, match=r"dataset 'org/none' cannot be loaded: .*hf download org/none"):
        read_dataset(DatasetPrompts(dataset="org/none"))


def test_other_columns_of_a_dataset_are_metadata_where_json_has_their_like(tmp_path):
    pytest.importorskip("datasets")
    import pyarrow
    from pyarrow import parquet

    columns = {
        "prompt": ["a cat", "a cat", "a dog"],
        "target_bytes": [900, 1, None],
        "boxes": [[[0.5, 1.0]], [], []],
        "of": [{"what": "cat", "times": 2}] * 3,
        "alone": [True, True, False],
        "when": [datetime.datetime(2026, 1, 2)] * 3,
        "thumbnail": [{"bytes": b"\x89PNG", "path": "x.png"}] * 3,
    }
    parquet.write_table(pyarrow.table(columns), tmp_path / "train.parquet")
    cat, dog = read_dataset(DatasetPrompts(dataset=str(tmp_path), file="train.parquet")).prompts
    of = {"what": "cat", "times": 2}
    assert cat == Prompt(0, "a cat", {"target_bytes": 900, "boxes": [[0.5, 1.0]], "of": of, "alone": True})
    assert dog == Prompt(1, "a dog", {"target_bytes": None, "boxes": [], "of": of, "alone": False})
    source = DatasetPrompts(dataset=str(tmp_path), file="train.parquet")
    held_out = tmp_path / "held-out.txt"
    held_out.write_text("a cat\n")
    prompts = PromptsSpec(train=source, evaluation=held_out, shared="drop", train_count=1)
    (only,) = read_prompts(small_experiment(GaussianSpec(), prompts=prompts), "train")
    assert only == Prompt(0, "a dog", dog.metadata)  # dropped before it is counted


def test_prompts_of_a_list_keep_their_metadata_in_the_order_of_every_epoch(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"cat {number}", "number": number}) + "\n" for number in range(6)))
    prompts = PromptsSpec(train=path, evaluation=path, train_count=5, evaluation_count=2)
    experiment = small_experiment(GaussianSpec(), prompts=prompts)
    train = read_prompts(experiment, "train")
    assert [(each.index, each.metadata["number"]) for each in train] == [(number, number) for number in range(5)]
    assert [each.metadata["number"] for each in read_prompts(experiment, "evaluation")] == [0, 1]
    order = Shuffle(5, 2, seed=3)
    asked = [train[row] for step in range(1, 11) for row in order.at(step)]
    assert all(prompt == train[prompt.index] for prompt in asked)
    assert {prompt.metadata["number"] for prompt in asked[:5]} == set(range(5))
    rng = np.random.default_rng((7919, 3, 0))
    assert [prompt.index for prompt in asked[:5]] == rng.permutation(5).tolist()


def test_prompts_are_keys_whatever_their_metadata():
    cat = Prompt(0, "a cat", {"boxes": [[0.5]]})
    assert {cat: 1}[Prompt(0, "a cat", {"boxes": [[0.5]]})] == 1
    assert cat != Prompt(0, "a cat", {"boxes": []})
