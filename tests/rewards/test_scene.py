from __future__ import annotations

import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from worlds import asked

from aegpo.core.interfaces import Reward
from aegpo.errors import AegpoError
from aegpo.models.shapes.captions import COLOURS, SHAPES
from aegpo.models.shapes.rendering import PALETTE, WHITE, Placed, coverage, paint
from aegpo.rewards.scene import SceneReward
from aegpo.rewards.scene_reading import NOTHING, components, read

DENSE, STRICT = SceneReward(), SceneReward(strict=True)


def picture(*objects: Placed, background: str | None = None) -> torch.Tensor:  # (1, 3, 24, 24)
    return torch.from_numpy(paint(list(objects), background)).permute(2, 0, 1)[None]


def draw_anywhere(x: float, y: float, colour: str, shape: str) -> np.ndarray:  # (1, 24, 24, 3)
    """One object whose cell's top left corner lies at (x, y), whole pixels, in or out of the grid."""
    image = np.ones((24, 24, 3), dtype=np.float32)
    alpha = coverage(shape)[..., None]
    image[y : y + 8, x : x + 8] = (1 - alpha) * np.array(WHITE) + alpha * np.array(PALETTE[colour])
    return image[None]


def test_ground_truth_is_strictly_right_and_has_full_dense_credit(renders):
    assert len(renders.captions) >= 2000
    assert STRICT.score(renders.images, asked(renders.captions)).mean() >= 0.99
    assert DENSE.score(renders.images, asked(renders.captions)).mean() >= 0.99


def test_the_caption_of_another_image_is_hardly_ever_right(renders):
    assert STRICT.score(renders.images, asked(renders.others)).mean() <= 0.01
    assert DENSE.score(renders.images, asked(renders.others)).mean() <= 0.1


@pytest.mark.parametrize("contrast", [0.7, 0.85])
@pytest.mark.parametrize("reward", [DENSE, STRICT])
def test_vividness_earns_nothing(renders, reward, contrast):
    """What is right scores the same at seven tenths of the contrast; what is wrong gains no more than it loses."""
    faded = 0.5 + contrast * (renders.images - 0.5)
    right, wrong = (
        reward.score(faded, asked(captions)) - reward.score(renders.images, asked(captions))
        for captions in (renders.captions, renders.others)
    )
    assert right.abs().max() < 1e-6
    assert wrong.mean().abs() < 0.01


def test_noise_hardly_changes_the_verdict(renders, noisy):
    assert STRICT.score(noisy, asked(renders.captions)).mean() >= 0.97
    assert STRICT.score(noisy, asked(renders.others)).mean() <= 0.01


def test_blur_and_noise_together_hardly_change_the_verdict(renders, noisy):
    kernel = torch.tensor([0.125, 0.75, 0.125])
    weight = (kernel[:, None] * kernel).repeat(3, 1, 1, 1)
    blurred = F.conv2d(F.pad(noisy, (1, 1, 1, 1), mode="replicate"), weight, groups=3)
    assert STRICT.score(blurred, asked(renders.captions)).mean() >= 0.97


def test_scores_are_float32_in_the_unit_interval_one_an_image(renders):
    for reward in (DENSE, STRICT):
        scores = reward.score(renders.images[:50], asked(renders.others[:50]))
        assert scores.dtype == torch.float32
        assert scores.shape == (50,)
        assert ((scores >= 0) & (scores <= 1)).all()


def test_strict_success_implies_full_dense_credit(renders, noisy):
    strict, dense = (reward.score(noisy, asked(renders.captions)) for reward in (STRICT, DENSE))
    assert (dense[strict == 1] > 0.999).all()


def test_the_score_of_an_image_does_not_depend_on_its_batch(renders):
    together = DENSE.score(renders.images[:40], asked(renders.others[:40]))
    alone = [DENSE.score(renders.images[i : i + 1], asked(renders.others[i : i + 1])) for i in range(40)]
    assert torch.equal(together, torch.cat(alone))


def test_each_object_right_earns_more_than_the_one_before():
    red = [Placed(0, 0, "red", "circle"), Placed(1, 1, "red", "circle"), Placed(2, 2, "red", "circle")]
    scores = [float(DENSE.score(picture(*red[:count]), asked(["three red circles"]))) for count in range(4)]
    assert scores == sorted(scores)
    assert len(set(scores)) == 4
    assert scores[-1] == 1.0


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        (picture(Placed(0, 0, "red", "square"), background="blue"), "shape"),
        (picture(Placed(0, 0, "green", "circle"), background="blue"), "colour"),
        (picture(Placed(0, 0, "red", "circle")), "background"),
        (picture(Placed(0, 0, "red", "circle"), Placed(1, 0, "red", "circle"), background="blue"), "count"),
        (picture(Placed(0, 0, "red", "circle"), Placed(1, 0, "green", "square"), background="blue"), "extra object"),
        (picture(background="blue"), "nothing there"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_one_mistake_costs_strict_success_and_some_dense_credit(wrong, what):
    caption = ["a red circle on a blue background"]
    assert STRICT.score(wrong, asked(caption)) == 0
    assert DENSE.score(wrong, asked(caption)) < 0.9, what


@pytest.mark.parametrize(
    ("relation", "cell"), [("left of", (1, 2)), ("right of", (1, 0)), ("above", (2, 1)), ("below", (0, 1))]
)
def test_a_relation_holds_in_its_direction_and_in_no_other(relation, cell):
    first, second = Placed(1, 1, "red", "circle"), Placed(*cell, "blue", "square")
    image = picture(first, second)
    holds = {
        word: float(STRICT.score(image, asked([f"a red circle {word} a blue square"])))
        for word in ("left of", "right of", "above", "below")
    }
    assert holds == {word: float(word == relation) for word in holds}
    assert DENSE.score(image, asked([f"a red circle {relation} a blue square"])) == 1


def test_the_relation_also_tells_apart_objects_of_one_colour():
    image = picture(Placed(0, 0, "red", "triangle"), Placed(0, 2, "red", "square"))
    assert STRICT.score(image, asked(["a red triangle left of a red square"])) == 1
    assert STRICT.score(image, asked(["a red square left of a red triangle"])) == 0


@settings(deadline=None, max_examples=60)
@given(
    x=st.integers(0, 16),
    y=st.integers(0, 16),
    colour=st.sampled_from(COLOURS),
    shape=st.sampled_from(SHAPES),
)
def test_an_object_is_read_wherever_it_lies_without_a_grid(x, y, colour, shape):
    (reading,) = read(draw_anywhere(x, y, colour, shape))
    assert reading.background == "white"
    (found,) = reading.objects
    assert (found.colour, found.shape) == (colour, shape)
    assert found.centre == pytest.approx((x + 4, y + 4), abs=1.2)


def test_neighbours_that_touch_are_read_as_two():
    image = picture(Placed(1, 0, "red", "square"), Placed(1, 1, "red", "square"))
    image[:, 1:, 10:14, 7:9] = 0.35  # a bridge of alpha 0.7 over the gap between them
    assert STRICT.score(image, asked(["two red squares"])) == 1


def test_components_connect_through_sides_and_not_through_corners_or_colours():
    o = NOTHING
    grid = np.array(
        [[[0, 0, o, 1], [o, 0, 1, 1], [2, o, 2, 1], [2, 2, 2, o]], [[0, o, o, o], [o, 0, o, o], *[[o] * 4] * 2]]
    )
    label, count = components(grid)
    assert count == 5
    assert label[0, 2, 0] == label[0, 2, 2]  # a U of colour 2
    assert label[0, 0, 0] == label[0, 1, 1]
    assert label[1, 0, 0] != label[1, 1, 1]
    assert (label > 0).tolist() == (grid != NOTHING).tolist()


def test_reading_an_image_takes_at_most_a_millisecond(renders):
    pick = torch.randperm(len(renders.captions), generator=torch.Generator().manual_seed(0))[:96]
    images, captions = renders.images[pick], [renders.captions[i] for i in pick]
    spent = []
    for _ in range(4):
        before = time.process_time()
        DENSE.score(images, asked(captions))
        spent.append(time.process_time() - before)
    assert min(spent) / len(captions) <= 1e-3


def test_images_of_another_size_are_refused_with_the_right_size():
    with pytest.raises(AegpoError, match=r"shape \(2, 3, 32, 32\) for 2 captions.*read \(2, 3, 24, 24\)"):
        DENSE.score(torch.zeros(2, 3, 32, 32), asked(["a red circle", "a red circle"]))


def test_fewer_captions_than_images_are_refused():
    with pytest.raises(AegpoError, match=r"\(2, 3, 24, 24\) for 1 captions"):
        DENSE.score(torch.zeros(2, 3, 24, 24), asked(["a red circle"]))


def test_a_prompt_outside_the_grammar_is_refused_with_an_example():
    with pytest.raises(AegpoError, match="'an oil painting' is not a sentence of the embedded world; one is"):
        DENSE.score(torch.zeros(1, 3, 24, 24), asked(["an oil painting"]))


def test_the_rewards_are_their_own_part_and_import_no_torch():
    assert isinstance(DENSE.build(torch.device("cpu")), Reward)
    code = (
        "import sys; from aegpo.rewards.scene import SceneReward; from aegpo.rewards.palette import PaletteReward; "
        "SceneReward(strict=True), PaletteReward(); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
