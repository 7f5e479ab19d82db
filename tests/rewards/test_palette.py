from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from worlds import asked

from aegpo.core.interfaces import Reward
from aegpo.errors import AegpoError
from aegpo.models.shapes.captions import parse
from aegpo.models.shapes.rendering import Placed, paint
from aegpo.rewards.palette import PaletteReward

REWARD = PaletteReward()


def picture(*objects: Placed, background: str | None = None) -> torch.Tensor:  # (1, 3, 24, 24)
    return torch.from_numpy(paint(list(objects), background)).permute(2, 0, 1)[None]


def score(image: torch.Tensor, caption: str) -> float:
    return float(REWARD.score(image, asked([caption])))


def test_every_ground_truth_picture_scores_one(renders):
    scores = REWARD.score(renders.images, asked(renders.captions))
    assert scores.min() >= 0.9999
    assert scores.max() <= 1
    assert scores.dtype == torch.float32


def test_the_caption_of_another_image_scores_little(renders):
    scores = REWARD.score(renders.images, asked(renders.others))
    assert scores.mean() <= 0.15
    assert scores.min() >= 0


def test_noise_costs_little_but_something(renders, noisy):
    scores = REWARD.score(noisy, asked(renders.captions))
    assert 0.95 <= scores.mean() < 0.999


def test_samples_of_one_caption_that_differ_slightly_score_differently():
    image = picture(Placed(0, 0, "red", "circle"), Placed(1, 1, "blue", "square"))
    noise = torch.randn(16, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    scores = REWARD.score((image + 0.03 * noise).clamp(0, 1), asked(["a red circle and a blue square"] * 16))
    assert len(set(scores.tolist())) == 16


def test_the_score_rises_smoothly_as_an_object_fades_in():
    empty, full = picture(background="green"), picture(Placed(1, 1, "yellow", "square"), background="green")
    fades = torch.linspace(0, 1, 41)[:, None, None, None]
    scores = REWARD.score(empty + fades * (full - empty), asked(["a yellow square on a green background"] * 41))
    rises = scores.diff()
    assert (rises > -1e-6).all()
    assert rises.max() < 0.2
    assert scores[-1] == pytest.approx(1, abs=1e-6)


def test_each_object_counts():
    circles = [Placed(0, 0, "red", "circle"), Placed(1, 1, "red", "circle"), Placed(2, 2, "red", "circle")]
    scores = [score(picture(*circles[:count]), "three red circles") for count in range(4)]
    assert all(before + 0.1 < after for before, after in pairwise(scores))


def test_one_object_too_many_costs():
    one, two = (Placed(0, column, "red", "circle") for column in (0, 2))
    assert score(picture(one, two), "a red circle") < 0.8


def test_the_mass_of_two_objects_in_one_blob_is_not_two_objects():
    blob = picture()
    blob[:, :, 0:8, 0:8] = picture(background="red")[:, :, 0:8, 0:8]  # 64 pixels, near the 72 of two squares
    apart = picture(Placed(0, 0, "red", "square"), Placed(2, 2, "red", "square"))
    assert score(blob, "two red squares") < 0.75 < score(apart, "two red squares")


def test_a_colour_nobody_asked_for_costs_in_proportion():
    wanted, foreign = Placed(0, 0, "red", "circle"), [Placed(2, column, "green", "square") for column in range(3)]
    scores = [score(picture(wanted, *foreign[:count]), "a red circle") for count in range(4)]
    assert scores == sorted(scores, reverse=True)
    assert scores[1] == pytest.approx(0.5, abs=0.1)


def test_where_objects_lie_does_not_matter():
    caption = "a purple circle left of a yellow triangle"
    one = picture(Placed(0, 0, "purple", "circle"), Placed(0, 1, "yellow", "triangle"))
    other = picture(Placed(2, 1, "purple", "circle"), Placed(1, 0, "yellow", "triangle"))
    assert score(one, caption) == pytest.approx(score(other, caption), abs=1e-6)


def test_two_groups_of_one_colour_pool_their_cells():
    image = picture(Placed(0, 0, "red", "circle"), Placed(1, 1, "red", "triangle"))
    assert score(image, "a red circle and a red triangle") == pytest.approx(1, abs=1e-5)
    assert score(image, "a red triangle and a red circle") == pytest.approx(1, abs=1e-5)
    assert score(image, "a red circle") < score(image, "two red circles") < 0.99


def test_the_score_depends_on_the_prompt(renders):
    kinds = {parse(caption).kind for caption in renders.captions}
    assert kinds == {"count", "pair", "relation", "mixed"}
    image = renders.images[:1].expand(len(set(renders.captions)), -1, -1, -1)
    assert REWARD.score(image, asked(list(dict.fromkeys(renders.captions)))).std() > 0.05


def test_images_of_another_size_are_refused_with_the_right_size():
    with pytest.raises(AegpoError, match=r"shape \(1, 3, 8, 8\) for 1 captions.*read \(1, 3, 24, 24\)"):
        REWARD.score(torch.zeros(1, 3, 8, 8), asked(["a red circle"]))


def test_a_prompt_outside_the_grammar_is_refused():
    with pytest.raises(AegpoError, match="is not a sentence of the embedded world"):
        REWARD.score(torch.zeros(1, 3, 24, 24), asked(["three blind mice"]))


def test_the_spec_is_its_own_part():
    assert isinstance(REWARD.build(torch.device("cpu")), Reward)
