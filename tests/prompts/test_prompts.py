"""Where a step's prompts come from."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from worlds import GaussianSpec, small_experiment

from aegpo.core.sections import PromptsSpec
from aegpo.errors import AegpoError
from aegpo.models.shapes import ShapesSpec
from aegpo.prompts.curricula import Shuffle
from aegpo.prompts.lists import numbered, read_prompts, refuse_few, refuse_shared

LETTERS = numbered("abcdefghij")


def words(prompts) -> tuple[str, ...]:
    return tuple(prompt.text for prompt in prompts)


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 5))
def test_every_prompt_comes_once_before_any_comes_again(total, per_step, seed):
    if per_step > total:
        return
    texts = tuple(f"prompt {index}" for index in range(total))
    prompts, order = numbered(texts), Shuffle(total, per_step, seed)
    drawn = [prompts[row] for step in range(1, 2 * total + 1) for row in order.at(step)]
    for epoch in range(len(drawn) // total):
        assert Counter(prompt.text for prompt in drawn[epoch * total : (epoch + 1) * total]) == Counter(texts)
    assert all(texts[prompt.index] == prompt.text for prompt in drawn)


def test_a_step_has_the_same_prompts_whatever_was_asked_before():
    asked = Shuffle(10, 3, seed=1)
    for step in (1, 2, 3, 9):
        asked.at(step)
    assert np.array_equal(asked.at(7), Shuffle(10, 3, seed=1).at(7))


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = {tuple(Shuffle(10, 10, seed=0).at(step)) for step in range(1, 6)}
    orders |= {tuple(Shuffle(10, 10, seed).at(1)) for seed in range(1, 6)}
    assert len(orders) == 10


def test_too_few_prompts_for_a_step_are_refused():
    with pytest.raises(AegpoError) as error:
        refuse_few(10, 11)
    assert (
        str(error.value)
        == "prompts: 10 training prompts are fewer than the 11 of a step; lower 'rollouts.prompts_per_step'"
    )


def test_prompts_of_a_file_are_its_lines_without_blank_ones_up_to_the_count(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("  a cat \n\n\ta caf\u00e9\n a dog", encoding="utf-8")
    experiment = small_experiment(GaussianSpec(), prompts=PromptsSpec(train=path, evaluation=path, evaluation_count=2))
    assert words(read_prompts(experiment, "train")) == ("a cat", "a caf\u00e9", "a dog")
    assert words(read_prompts(experiment, "evaluation")) == ("a cat", "a caf\u00e9")


def test_files_that_are_missing_or_empty_are_refused(tmp_path):
    missing, empty = tmp_path / "missing.txt", tmp_path / "empty.txt"
    empty.write_text("\n  \n")
    with pytest.raises(AegpoError) as error:
        read_prompts(small_experiment(GaussianSpec(), prompts=PromptsSpec(train=missing)), "train")
    assert str(error.value) == f"prompts: cannot read {missing}: No such file or directory"
    with pytest.raises(AegpoError) as error:
        read_prompts(small_experiment(GaussianSpec(), prompts=PromptsSpec(evaluation=empty)), "evaluation")
    assert str(error.value) == f"prompts: {empty} has no prompts; it should have one a line"


def test_a_file_that_is_not_text_is_refused(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"a cat\n\xff\xfe\n")
    with pytest.raises(AegpoError, match=r"prompts.txt, line 2: not UTF-8 text \(byte 0xff\)"):
        read_prompts(small_experiment(GaussianSpec(), prompts=PromptsSpec(train=path)), "train")


def test_without_a_file_the_models_own_captions_are_drawn_and_never_shared_between_splits():
    experiment = small_experiment(ShapesSpec(), prompts=PromptsSpec(train_count=200, evaluation_count=64, seed=3))
    train, held_out = read_prompts(experiment, "train"), read_prompts(experiment, "evaluation")
    assert (len(train), len(held_out)) == (200, 64)
    assert not set(words(train)) & set(words(held_out))
    assert read_prompts(experiment.model_copy(update={"seed": 9}), "train") == train  # the same for every arm and seed


def test_evaluation_prompts_that_are_trained_on_are_refused():
    refuse_shared(numbered(["a cat", "a dog"]), numbered(["a bird"]))
    with pytest.raises(AegpoError, match="1 of 2 evaluation prompts are trained on too, such as 'a dog'"):
        refuse_shared(numbered(["a cat", "a dog"]), numbered(["a bird", "a dog"]))


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 9])
def test_what_a_run_will_see_is_known_before_it_begins(steps):
    order = Shuffle(9, per_step=3, seed=5)
    seen = {int(row) for step in range(1, steps + 1) for row in order.at(step)}
    assert set(order.candidates(steps).tolist()) == seen
    assert len(order.candidates(steps)) == min(3 * steps, 9)
