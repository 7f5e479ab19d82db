from __future__ import annotations

import json

import pytest

from aegpo.errors import AegpoError
from aegpo.rewards.hpsv2_prompts import STYLES, benchmark_prompts


@pytest.fixture
def root(tmp_path):
    """As the hpsv2 package leaves it."""
    folder = tmp_path / "datasets" / "benchmark"
    folder.mkdir(parents=True)
    for style in STYLES:
        (folder / f"{style}.json").write_text(json.dumps([f"{style} of a cat", f"{style} of a caf\u00e9"]))
    return tmp_path


def test_prompts_are_read_style_by_style_where_the_package_keeps_them(root):
    prompts = benchmark_prompts({"HPS_ROOT": str(root)})
    assert tuple(prompts) == STYLES
    assert prompts["photo"] == ("photo of a cat", "photo of a caf\u00e9")


def test_the_home_of_the_package_is_the_default(root, monkeypatch):
    monkeypatch.setenv("HOME", str(root.parent))
    (root.parent / ".cache").mkdir()
    root.rename(root.parent / ".cache" / "hpsv2")
    assert benchmark_prompts({})["anime"][0] == "anime of a cat"


def test_prompts_that_cannot_be_had_name_the_command_that_gets_them(tmp_path):
    message = r"of 'zhwang/HPDv2' from .* 'hf download zhwang/HPDv2 --repo-type dataset benchmark/anime.json' once"
    with pytest.raises(AegpoError, match=message):
        benchmark_prompts({"HPS_ROOT": str(tmp_path)})


@pytest.mark.parametrize("content", ["{}", "[]", "[1]"])
def test_a_file_that_is_no_list_of_texts_is_an_error(content, root):
    (root / "datasets" / "benchmark" / "anime.json").write_text(content)
    with pytest.raises(AegpoError, match=r"anime.json is no list of texts"):
        benchmark_prompts({"HPS_ROOT": str(root)})


def test_a_file_that_is_no_json_is_an_error(root):
    (root / "datasets" / "benchmark" / "anime.json").write_text("[")
    with pytest.raises(AegpoError, match=r"anime.json cannot be read"):
        benchmark_prompts({"HPS_ROOT": str(root)})
