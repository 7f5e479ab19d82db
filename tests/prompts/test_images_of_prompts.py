"""Images that prompts name: found beside their file, missed with its line, and part of what is asked."""

from __future__ import annotations

import json

import numpy as np
import pytest
from image_distance import ImageDistance
from PIL import Image
from worlds import GaussianSpec, small_experiment

from aegpo.core.records import Prompt
from aegpo.core.sections import DatasetPrompts, PromptsSpec
from aegpo.errors import AegpoError, ContractError
from aegpo.method.signals.base_entropies import BaseCurves
from aegpo.prompts.datasets import read_dataset
from aegpo.prompts.files import read_file
from aegpo.prompts.lists import lacking, quoted, read_prompts, refuse_shared
from aegpo.prompts.problems import problems
from aegpo.testing import check_reward
from aegpo.train.scoring import Scorer, _due


class Reading(GaussianSpec):
    """A model that says it reads images."""

    reads_images = True


@pytest.fixture
def pictures(tmp_path):
    """Two images in a folder beside the prompts."""
    (tmp_path / "pictures").mkdir()
    paths = [tmp_path / "pictures" / name for name in ("dark.png", "bright.png")]
    for path, level in zip(paths, (20, 200), strict=True):
        Image.new("RGB", (4, 4), (level, level, level)).save(path)
    return paths


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_line_names_its_images_from_the_folder_of_the_file(pictures, tmp_path, monkeypatch):
    dark, bright = pictures
    path = write(
        tmp_path / "prompts.jsonl",
        {"prompt": "a", "image": "pictures/dark.png", "style": "plain"},
        {"prompt": "b", "images": ["pictures/../pictures/dark.png", str(bright)]},
        {"prompt": "c", "image": None, "images": []},
        "d",
    )
    monkeypatch.chdir("/")
    found = read_file(path)
    assert [(each.images, each.metadata) for each in found] == [
        ((dark,), {"style": "plain"}),
        ((dark, bright), {}),
        ((), {}),
        ((), {}),
    ]
    (tmp_path / "prompts.json").write_text(json.dumps([{"prompt": "a", "image": "pictures/dark.png"}]))
    assert read_file(tmp_path / "prompts.json") == (Prompt(0, "a", {}, (dark,)),)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": "x.png"}, "no image 'x.png' in '{folder}'; paths go from the folder of the prompts"),
        ({"images": ["pictures/dark.png", "pictures/y.png"]}, "no image 'y.png' in '{folder}/pictures'; paths go"),
        ({"image": "pictures"}, "no image 'pictures' in '{folder}'"),
        ({"image": "prompts.jsonl"}, "'prompts.jsonl' in '{folder}' is no image"),
        ({"image": 3}, "'image' is 3; a path was expected"),
        ({"images": "pictures/dark.png"}, "'images' is \"pictures/dark.png\"; a list of paths was expected"),
        ({"images": [None]}, "'images' is [null]; a list of paths was expected"),
        ({"image": "a", "images": ["b"]}, "has both 'image' and 'images'; name all its images under 'images'"),
    ],
)
def test_an_image_that_is_not_there_is_told_with_its_line(pictures, tmp_path, row, message):
    path = write(tmp_path / "prompts.jsonl", "a", {"prompt": "b", **row})
    with pytest.raises(AegpoError) as error:
        read_file(path)
    told = error.value.message
    assert told.startswith(f"{path}, line 2")
    assert message.format(folder=tmp_path) in told


def test_missing_images_are_told_at_load_whoever_reads_them(pictures, tmp_path):
    path = write(tmp_path / "prompts.jsonl", {"prompt": "0.5", "image": "x.png"})
    of_file = PromptsSpec(train=path, evaluation=path)
    blind = small_experiment(GaussianSpec(), prompts=of_file)
    for experiment in (
        blind,
        small_experiment(Reading(), prompts=of_file),
        small_experiment(GaussianSpec(), prompts=of_file, rewards=(ImageDistance(),)),
    ):
        for found, split in zip(problems(experiment), ("train", "evaluation"), strict=True):
            assert found.location == ("prompts", split)
            assert found.message.startswith(f"{path}, line 1: no image 'x.png' in ")
            assert not found.warning
    with pytest.raises(AegpoError, match=r"line 1: no image 'x.png' in"):
        read_prompts(blind, "train")


def test_a_prompt_without_the_image_that_a_reward_needs_is_refused(pictures, tmp_path):
    path = write(tmp_path / "prompts.jsonl", {"prompt": "0.5", "image": "pictures/dark.png"}, "0.6")
    own = (ImageDistance(name="near"),)
    told = [each.message for each in problems(small_experiment(GaussianSpec(), rewards=own, prompts=PromptsSpec()))]
    none = "reward 'near' needs an image, but captions of model 'gaussian' have none; name a file that has some as "
    assert told == [f"{none}'train'", f"{none}'evaluation'"]
    held_out = write(tmp_path / "held-out.jsonl", {"prompt": "0.7", "image": "pictures/dark.png"}, "0.8")
    spec = PromptsSpec(train=path, evaluation=held_out)
    told = problems(small_experiment(GaussianSpec(), rewards=own, prompts=spec))
    lacks = "reward 'near' needs an image, but this prompt has none; name one as 'image'"
    assert [each.message for each in told] == [f"{each}, line 2: {lacks}" for each in (path, held_out)]
    dark = Prompt(0, "a", {}, (pictures[0],))
    assert list(lacking(own, quoted([dark, Prompt(1, "b")]))) == [f"prompt 'b': {lacks}"]


def test_a_reward_that_compares_with_images_conforms_on_prompts_that_have_them(pictures):
    dark, bright = (Prompt(0, "a", {}, (path,)) for path in pictures)
    check_reward(ImageDistance(), [dark, bright, dark], size=(4, 4))
    with pytest.raises(ContractError, match=r"needs an image, but this prompt has none; .*; give check_reward prompts"):
        check_reward(ImageDistance(), [dark, bright, "a"], size=(4, 4))


# --- prompts that share their text -----------------------------------------------------------------------------------


def test_prompts_of_one_text_and_different_images_are_different_prompts(pictures, tmp_path):
    dark, bright = (Prompt(0, "redder", {}, (path,)) for path in pictures)
    assert dark != bright
    assert len({dark, bright}) == 2
    refuse_shared([dark], [bright])
    with pytest.raises(AegpoError, match="1 of 1 evaluation prompts are trained on too, such as 'redder'"):
        refuse_shared([dark, bright], [dark])
    train = write(
        tmp_path / "train.jsonl", *({"prompt": "redder", "image": f"pictures/{path.name}"} for path in pictures)
    )
    (tmp_path / "other").mkdir()
    held_out = write(tmp_path / "other" / "held.jsonl", {"prompt": "redder", "image": "../pictures/dark.png"})
    spec = PromptsSpec(train=train, evaluation=held_out, shared="drop")
    assert read_prompts(small_experiment(GaussianSpec(), prompts=spec), "train") == (bright,)


def test_a_comparison_of_one_prompt_waits_for_its_images_not_for_those_of_another_of_that_text(pictures):
    dark, bright = (Prompt(index, "redder", {}, (path,)) for index, path in enumerate(pictures))
    scorer = Scorer("r", ImageDistance(), lane="elsewhere", early=1, group_wise=True)
    assert _due(scorer, [dark, dark, bright, bright]).tolist() == [2, 2, 4, 4]


def test_rows_of_a_dataset_in_a_folder_name_their_images(pictures, tmp_path):
    pytest.importorskip("datasets")
    names = ["pictures/dark.png", "pictures/bright.png", "pictures/dark.png", None]
    rows = [{"prompt": "redder", "image": name, "id": number} for number, name in enumerate(names)]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    source = DatasetPrompts(dataset=str(tmp_path), file="train.json")
    dark, bright, bare = read_dataset(source).prompts
    assert (dark, bright) == tuple(Prompt(row, "redder", {"id": row}, (pictures[row],)) for row in (0, 1))
    assert bare == Prompt(2, "redder", {"id": 3})
    assert read_dataset(source, {dark.asked}, count=1).prompts == (Prompt(0, "redder", {"id": 1}, (pictures[1],)),)
    (tmp_path / "train.json").write_text(json.dumps([{"prompt": "a"}, {"prompt": "b", "image": "x.png"}]))
    with pytest.raises(AegpoError, match=r"dataset '.*' \(train.json\), row 1: no image 'x.png' in "):
        read_dataset(source)
    assert len(read_dataset(source, count=1).prompts) == 1  # a row that is not taken is not looked at


def test_entropies_of_the_base_are_known_by_what_is_in_the_images_of_a_prompt(pictures):
    known, prompt = BaseCurves(), Prompt(0, "redder", {}, (pictures[0],))
    known.add(1, [prompt], np.ones((1, 4)))
    assert known.missing([prompt, Prompt(0, "redder"), Prompt(0, "redder", {}, (pictures[1],))]) == [1, 2]
    moved = Prompt(0, "redder", {}, (pictures[0].rename(pictures[0].with_name("renamed.png")),))
    assert known.missing([moved]) == []
    moved.images[0].write_bytes(pictures[1].read_bytes())
    assert known.missing([moved]) == [0]
