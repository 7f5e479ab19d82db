"""Reward `diversity`: the mean pairwise distance of a prompt's images, in closed form."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from worlds import asked

from aegpo.commands.serve_reward import ServeRequest, reward_spec
from aegpo.core.interfaces import Reward
from aegpo.errors import AegpoError, RewardError
from aegpo.plugin.manager import load_registries, plugin_manager
from aegpo.rewards.diversity import DiversityReward
from aegpo.testing import check_reward
from aegpo.train.scoring import build_scorers, score

REWARD = DiversityReward()
CPU = torch.device("cpu")


def grey(*shades: float, size: tuple[int, ...] = (3, 5, 7)) -> torch.Tensor:
    return torch.stack([torch.full(size, shade) for shade in shades])


def random_images(count: int, *leading: int) -> torch.Tensor:
    return torch.rand((count, *leading, 3, 6, 5), generator=torch.Generator().manual_seed(count))


def test_it_conforms():
    check_reward(REWARD)
    check_reward(DiversityReward(frames="min"))
    assert isinstance(REWARD.build(CPU), Reward)


def test_images_that_are_the_same_have_none():
    image = random_images(1)
    assert REWARD.score(image.repeat(4, 1, 1, 1), asked("aaaa")).tolist() == [0.0] * 4


@pytest.mark.parametrize("size", [(3, 1, 1), (3, 24, 24), (3, 512, 511), (4, 3, 8, 9)])
def test_black_and_white_have_all_of_it_at_any_size(size):
    assert REWARD.score(grey(0, 1, size=size), asked("aa")).tolist() == [1.0, 1.0]


def test_each_of_three_has_the_mean_distance_to_the_two_others():
    found = REWARD.score(grey(0.0, 0.25, 1.0), asked("aaa"))
    assert found.tolist() == [(0.25 + 1) / 2, (0.25 + 0.75) / 2, (1 + 0.75) / 2]
    assert float(found.mean()) == pytest.approx((0.25 + 0.75 + 1) / 3)  # the mean of the pairs


def test_a_distance_is_a_root_mean_square_and_no_mean_of_distances_of_pixels():
    images = torch.zeros(2, 3, 2, 2)
    images[1, :, 0, 0] = 1.0  # a quarter of the pixels
    assert REWARD.score(images, asked("aa")).tolist() == [0.5, 0.5]


def test_images_are_compared_with_those_of_their_own_prompt_alone():
    found = REWARD.score(grey(0.0, 0.5, 1.0, 0.75), asked("abab"))
    assert found.tolist() == [1.0, 0.25, 1.0, 0.25]


@given(st.permutations(range(7)))
def test_the_order_of_images_does_not_matter(order):
    images, prompts = random_images(7), asked("aababba")
    moved = REWARD.score(images[order], [prompts[row] for row in order])
    torch.testing.assert_close(moved, REWARD.score(images, prompts)[order])


def test_its_mean_over_a_prompt_is_the_mean_over_all_pairs():
    images = random_images(5)
    pairs = [(one - other).square().mean().sqrt() for one, other in combinations(images, 2)]
    found = REWARD.score(images, asked("aaaaa"))
    torch.testing.assert_close(found.mean(), torch.stack(pairs).mean())
    assert found.min() >= 0
    assert found.max() <= 1
    assert found.dtype == torch.float32


def test_videos_are_compared_over_all_frames_or_frame_by_frame():
    videos = torch.zeros(2, 4, 3, 6, 5)
    videos[1, 0] = 1.0  # one frame of four
    specs = [DiversityReward(), *(DiversityReward(name=rule, frames=rule) for rule in ("mean", "first", "min"))]
    found = score(build_scorers(specs, CPU), videos, asked("aa"))
    assert {label: values.tolist() for label, values in found.items()} == {
        "diversity": [0.5, 0.5],
        "mean": [0.25, 0.25],
        "first": [1.0, 1.0],
        "min": [0.0, 0.0],
    }


def test_a_prompt_with_one_image_is_refused_by_name():
    scorers = build_scorers([DiversityReward(name="spread")], CPU)
    with pytest.raises(RewardError, match="reward 'spread': prompt 'b' has one image; a comparison needs two"):
        score(scorers, grey(0, 1, 0.5), asked("aab"))


def test_a_server_does_not_have_it():
    with pytest.raises(AegpoError, match="reward 'diversity' compares all images of a prompt, but a server"):
        reward_spec(ServeRequest("diversity"), load_registries(plugin_manager()).rewards)
