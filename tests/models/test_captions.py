from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest

from aegpo.errors import AegpoError
from aegpo.models.shapes.captions import (
    COLOURS,
    COUNTS,
    KINDS,
    MIXED_COUNTS,
    RELATIONS,
    SHAPES,
    Group,
    Scene,
    captions,
    parse,
    scenes,
)

OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
OBJECTS = len(COLOURS) * len(SHAPES)


@pytest.fixture(scope="module")
def everything() -> dict[str, list[Scene]]:
    return {
        split: [scene for members in scenes(split).values() for scene in members] for split in ("train", "evaluation")
    }


def test_parse_is_the_inverse_of_caption_for_every_scene(everything):
    for members in everything.values():
        for scene in members:
            assert parse(scene.caption) == scene


def test_no_two_scenes_share_a_caption(everything):
    words = [scene.caption for members in everything.values() for scene in members]
    assert len(words) == len(set(words))


def test_no_evaluation_scene_occurs_in_training_in_other_words_or_on_another_background(everything):
    training = {scene.caption for scene in everything["train"]}
    for scene in everything["evaluation"]:
        relation = OPPOSITE[scene.relation] if scene.relation else None
        for background in (None, *COLOURS):
            same = replace(scene, background=background)
            swapped = replace(same, groups=scene.groups[::-1], relation=relation)
            assert same.caption not in training
            assert swapped.caption not in training


def test_the_splits_together_are_every_combination_once(everything):
    plain = Counter(scene.kind for members in everything.values() for scene in members if scene.background is None)
    ordered_pairs = OBJECTS * (OBJECTS - 1)
    assert plain == {
        "count": OBJECTS * len(COUNTS),
        "pair": ordered_pairs,
        "relation": ordered_pairs * len(RELATIONS),
        "mixed": ordered_pairs * len(MIXED_COUNTS),
    }


def test_about_a_fifth_of_the_scenes_of_a_split_is_held_out(everything):
    held_out = len(everything["evaluation"])
    assert 0.15 <= held_out / (held_out + len(everything["train"])) <= 0.25


def test_the_background_never_hides_an_object(everything):
    for members in everything.values():
        assert all(scene.background not in {group.colour for group in scene.groups} for scene in members)


def test_captions_are_the_same_for_the_same_seed_and_others_for_another():
    assert captions("train", 100, 7) == captions("train", 100, 7)
    assert captions("train", 100, 7) != captions("train", 100, 8)
    assert captions("train", 100, 7)[:40] == captions("train", 40, 7)


def test_drawing_captions_leaves_the_global_generator_alone():
    random.seed(0)
    before = random.getstate()
    captions("evaluation", 20)
    assert random.getstate() == before


@pytest.mark.parametrize("split", ["train", "evaluation"])
def test_captions_are_distinct_of_their_split_and_take_the_kinds_in_turn(split):
    drawn = captions(split, 200, 3)
    assert len(set(drawn)) == 200
    assert [parse(caption).kind for caption in drawn] == list(KINDS) * 50
    assert all(parse(caption).held_out == (split == "evaluation") for caption in drawn)


def test_asking_for_too_many_captions_says_how_many_there_are():
    most = len(KINDS) * min(len(members) for members in scenes("evaluation").values())
    assert len(captions("evaluation", most)) == most
    with pytest.raises(AegpoError, match=f"{most + 10} asked for, at most {most}"):
        captions("evaluation", most + 10)


@pytest.mark.parametrize(
    ("caption", "scene"),
    [
        ("a red circle", Scene((Group(1, "red", "circle"),))),
        ("three red circles", Scene((Group(3, "red", "circle"),))),
        (
            "two green squares and a purple triangle",
            Scene((Group(2, "green", "square"), Group(1, "purple", "triangle"))),
        ),
        (
            "a green square left of a yellow triangle on a blue background",
            Scene((Group(1, "green", "square"), Group(1, "yellow", "triangle")), "left of", "blue"),
        ),
    ],
)
def test_these_sentences_mean_these_scenes(caption, scene):
    assert parse(caption) == scene
    assert parse(f"  {caption}\n") == scene


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "a red circles",
        "two red circle",
        "five red circles",
        "a pink circle",
        "a red hexagon",
        "a red circle on a blue",
        "a red circle on a white background",
        "a red circle and",
        "a red circle and a blue square and a green triangle",
        "a red circle near a blue square",
        "A red circle",
        "a  red circle",
    ],
)
def test_any_other_sentence_is_refused_with_an_example_and_the_known_words(caption):
    with pytest.raises(AegpoError) as caught:
        parse(caption)
    message = str(caught.value)
    assert f"caption {caption!r} is not a sentence of the embedded world" in message
    assert "two red circles and a blue square on a yellow background" in message
    assert all(word in message for word in (*COLOURS, *SHAPES, *COUNTS, *RELATIONS))
