"""One file of prompts for both lists: what is held out, what never is on both sides, and what a run remembers of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from command_line import aegpo
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from worlds import GaussianSpec, small_experiment

from aegpo.core.sections import PromptsSpec
from aegpo.errors import AegpoError
from aegpo.prompts.lists import read_prompts
from aegpo.prompts.problems import problems
from aegpo.prompts.splitting import split_digests, split_file

CATS = [f"cat {number}" for number in range(40)]


def experiment(path: Path, **prompts):
    return small_experiment(GaussianSpec(), prompts=PromptsSpec(file=path, **prompts))


def sides(path: Path, **prompts) -> tuple[list[str], list[str]]:
    """Texts that are trained on and that are held out."""
    asked = experiment(path, **prompts)
    return tuple([each.text for each in read_prompts(asked, split)] for split in ("train", "evaluation"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("split")


@given(st.lists(st.sampled_from(CATS), min_size=12), st.integers(1, 4), st.integers(0, 3), st.randoms())
def test_every_prompt_is_on_one_side_whatever_repeats_and_in_whatever_order(folder, texts, count, seed, shuffle):
    path = folder / "mine.txt"
    if len(set(texts)) < count + 2:
        return
    path.write_text("\n".join(texts))
    train, held_out = sides(path, evaluation_count=count, seed=seed)
    assert not set(train) & set(held_out)
    assert len(held_out) == len(set(held_out)) == count
    assert train == [text for text in texts if text not in held_out]
    assert held_out == sorted(held_out, key=texts.index)
    mixed = shuffle.sample(texts, len(texts))
    path.write_text("\n".join(mixed))
    assert set(sides(path, evaluation_count=count, seed=seed)[1]) == set(held_out)


def test_what_is_held_out_is_pinned_and_follows_the_seed_and_the_count(folder):
    path = folder / "cats.txt"
    path.write_text("\n".join(CATS))
    held = {seed: sides(path, evaluation_count=4, seed=seed)[1] for seed in (0, 1)}
    assert held == {
        0: ["cat 9", "cat 11", "cat 12", "cat 39"],
        1: ["cat 0", "cat 4", "cat 7", "cat 38"],
    }
    assert set(held[0]) < set(sides(path, evaluation_count=5)[1])


def test_images_are_part_of_a_prompt_and_where_the_folder_lies_is_not(tmp_path):
    here = tmp_path / "here"
    here.mkdir()
    rows = []
    for number in range(12):
        Image.new("RGB", (4, 4)).save(here / f"{number}.png")
        rows.append(json.dumps({"prompt": "make it red", "image": f"{number}.png"}))
    (here / "mine.jsonl").write_text("\n".join(rows))
    shutil.copytree(here, tmp_path / "there")
    both = [experiment(tmp_path / place / "mine.jsonl", evaluation_count=3) for place in ("here", "there")]
    names = [[image.name for each in split_file(one)[1].values() for image in each.images] for one in both]
    assert names[0] == names[1]
    assert len(set(names[0])) == 3
    assert split_digests(both[0]) == split_digests(both[1])


def test_a_file_with_too_few_prompts_is_refused_with_how_many_would_do(folder):
    path = folder / "few.txt"
    path.write_text("\n".join([*CATS[:10], *CATS[:10]]))
    with pytest.raises(AegpoError) as error:
        sides(path, evaluation_count=9)
    assert str(error.value) == (
        f"prompts: {path} has 10 different prompts; with 9 held out 1 would be left, fewer than the 2 of a training "
        "step: lower 'evaluation_count' to 8 or less, or add prompts"
    )
    with pytest.raises(AegpoError, match="with 64 held out none would be left"):
        sides(path)
    assert len(sides(path, evaluation_count=8)[0]) == 4


def test_both_lists_in_one_file_and_in_files_of_their_own_are_refused_together(folder):
    path = folder / "cats.txt"
    with pytest.raises(ValueError, match="'file' is for both lists, so it goes with no 'evaluation'; leave one out"):
        PromptsSpec(file=path, evaluation=path)


def test_what_has_no_effect_beside_a_file_and_what_of_it_is_not_used_is_told(folder):
    path = folder / "told.txt"
    path.write_text("\n".join([*CATS, CATS[0], CATS[9]]))  # CATS[9] is held out
    asked = experiment(path, evaluation_count=4, train_count=30, shared="drop")
    assert [(each.location, each.message) for each in (*asked.problems(), *problems(asked)) if each.warning] == [
        (("prompts", "shared"), "has no effect: of a 'file' no prompt is in both lists; remove it"),
        (("prompts", "train_count"), f"only the first 30 of 37 prompts of {path} are trained on; 37 takes all"),
    ]
    (again,) = problems(experiment(path, evaluation_count=4))
    assert again.location == ("prompts", "file")
    assert "1 of 37 prompts of" in again.message


# --- in runs ---------------------------------------------------------------------------------------------------------

EXPERIMENT = """
name: mine
training_steps: 1
device: cpu
model: shapes
prompts: {file: mine.txt, evaluation_count: 3}
rollouts: {prompts_per_step: 2, rollouts_per_step: 4, denoising_steps: 2}
rewards: [palette]
allocator: uniform
selector: uniform
tree: independent
sampler: flow-sde
advantage: group
objective: clipped
"""
CAPTIONS = [
    f"{count} {colour} {shape}s on a yellow background"
    for count in ("two", "three")
    for colour in ("red", "green", "blue")
    for shape in ("circle", "square")
]


def test_a_run_goes_on_and_is_evaluated_with_the_split_that_it_was_begun_with_or_not_at_all(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(EXPERIMENT)
    Path("mine.txt").write_text("\n".join(CAPTIONS))
    run = Path("runs/mine/main/seed-0")
    assert aegpo("run", "mine.yaml", "--no-report").code == 0
    row = json.loads((run / "evaluations.jsonl").read_text().splitlines()[0])
    held_out = row["prompts"]
    assert len(held_out) == 3
    assert held_out == [text for text in CAPTIONS if text in held_out]
    noted = json.loads((run / "manifest.json").read_text())["split"]
    assert noted.keys() == {"train", "evaluation"}
    (run / "finished.json").unlink()
    assert aegpo("run", "mine.yaml", "--no-report").code == 0  # the same file: goes on
    (run / "finished.json").unlink()
    Path("mine.txt").write_text("\n".join(text for text in CAPTIONS if text != held_out[0]))
    for words in (("run", "mine.yaml", "--no-report"), ("evaluate", str(run)), ("profile-entropy", str(run))):
        done = aegpo(*words)
        assert done.code == 2
        assert "mine.txt was changed since runs/mine/main/seed-0 was begun, and other prompts of it" in done.stderr
        assert "are trained on and held out: put it back as it was" in done.stderr
    Path("mine.txt").write_text("\n".join([*CAPTIONS, "four red circles on a green background"]))
    assert aegpo("run", "mine.yaml", "--no-report").code == 2
    assert aegpo("sample", str(run), "--prompt", CAPTIONS[0]).code == 0  # needs no prompts of the run's
    assert aegpo("run", "mine.yaml", "--no-report", "--fresh").code == 0
