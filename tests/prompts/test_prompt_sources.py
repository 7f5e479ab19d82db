"""Prompts from text and JSON files and from datasets."""

from __future__ import annotations

import json

import pytest
from worlds import GaussianSpec, small_experiment

from aegpo.core.sections import DatasetPrompts, PromptsSpec
from aegpo.errors import AegpoError
from aegpo.prompts.lists import read_prompts
from aegpo.prompts.sources import read_dataset, read_file


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
    assert read_prompts(small_experiment(GaussianSpec(), prompts=prompts), "train") == ("a cat", "a bird")


def test_a_dataset_in_a_folder_gives_each_prompt_once(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    (tmp_path / "data").mkdir()
    rows = [{"prompt": text, "id": number} for number, text in enumerate(("a cat", "a dog", "a cat"))]
    (tmp_path / "data" / "train.json").write_text(json.dumps(rows))
    source = DatasetPrompts(dataset=str(tmp_path / "data"), file="train.json")
    assert read_dataset(source) == ("a cat", "a dog")
    with pytest.raises(AegpoError, match="has no column 'text'; it has prompt, id"):
        read_dataset(source.model_copy(update={"column": "text"}))
    with pytest.raises(AegpoError, match=r"dataset 'org/none' cannot be loaded: .*hf download org/none"):
        read_dataset(DatasetPrompts(dataset="org/none"))
