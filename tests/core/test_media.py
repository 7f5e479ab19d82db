"""What a model paints and a reward reads must fit; `check` says so at the line of the reward, without torch."""

from __future__ import annotations

from pathlib import Path

import pytest
import video_world
from worlds import BrightnessReward, GaussianSpec, small_experiment

from aegpo.config.loading import load_experiment_file, parse_experiment
from aegpo.core import contracts
from aegpo.core.experiment import EvaluationSpec
from aegpo.core.media import why_unread
from aegpo.errors import ContractError, SpecError
from aegpo.models.shapes import ShapesSpec
from aegpo.plugin.manager import load_registries, plugin_manager
from aegpo.rewards.palette import PaletteReward
from aegpo.runs.manifest import experiment_changes

VIDEOS, IMAGES = video_world.TinyVideos(), GaussianSpec()
FILE = """
name: v
model: tiny-videos
rewards:
  - motion
  - kind: redness
    weight: 0.5
evaluation:
  rewards: [{kind: motion, name: other, frames: min}]
prompts: {train_count: 4, evaluation_count: 2}
rollouts: {prompts_per_step: 2, rollouts_per_step: 8}
"""


@pytest.mark.parametrize(
    ("reward", "model"),
    [
        (BrightnessReward(), IMAGES),
        (BrightnessReward(frames="min"), VIDEOS),
        (video_world.Motion(), VIDEOS),
        (video_world.Light(), IMAGES),
        (video_world.Light(), VIDEOS),
        (video_world.Light(frames="first"), VIDEOS),
    ],
)
def test_a_reward_reads_what_it_says(reward, model):
    assert why_unread(reward, model) is None


@pytest.mark.parametrize(
    ("reward", "model", "why"),
    [
        (
            BrightnessReward(name="b"),
            VIDEOS,
            "reward 'b' reads images, but model 'tiny-videos' paints videos; say what becomes of its scores of the "
            "frames: 'frames: mean', 'first' or 'min'",
        ),
        (
            BrightnessReward(frames="mean"),
            IMAGES,
            "reward 'brightness' has 'frames: mean', but model 'gaussian' paints images, which have none; leave it out",
        ),
        (
            video_world.Light(frames="mean"),
            IMAGES,
            "reward 'light' has 'frames: mean', but model 'gaussian' paints images, which have none; leave it out",
        ),
        (
            video_world.Motion(),
            IMAGES,
            "reward 'motion' reads videos, but model 'gaussian' paints images; choose a model of videos, or another "
            "reward",
        ),
        (
            video_world.Motion(frames="first"),
            VIDEOS,
            "reward 'motion' reads videos whole, so 'frames: first' has nothing to do; leave it out",
        ),
    ],
)
def test_a_reward_that_cannot_read_what_is_painted_says_what_would_be_right(reward, model, why):
    assert why_unread(reward, model) == why
    assert [each.message for each in small_experiment(model, rewards=(reward,)).problems()] == [why]
    guarded = small_experiment(
        model, rewards=(video_world.Light(name="fits"),), evaluation=EvaluationSpec(rewards=(reward,))
    )
    assert [each.message for each in guarded.problems()] == [why]


def test_the_line_of_each_reward_that_does_not_fit_is_named(tmp_path):
    path = tmp_path / "v.yaml"
    path.write_text(FILE)
    registries = load_registries(plugin_manager(["video_world"]))
    with pytest.raises(SpecError) as refused:
        load_experiment_file(path, registries)
    assert "v.yaml:6:5: rewards.1: reward 'redness' reads images, but model 'tiny-videos' paints" in str(refused.value)
    assert "v.yaml:9:49: evaluation.rewards.0.frames: reward 'other' reads videos whole" in str(refused.value)
    changes = ["rewards.1.frames=mean", "evaluation.rewards.0={kind: light, frames: first}"]
    assert load_experiment_file(path, registries, changes).arms["main"].rewards[1].frames == "mean"


def test_a_run_that_was_begun_before_there_were_frames_is_the_same_experiment():
    begun = small_experiment(ShapesSpec(), rewards=(PaletteReward(),)).model_dump(mode="json")
    assert begun["rewards"][0].pop("frames") is None
    experiment = parse_experiment(begun, load_registries(plugin_manager()))
    assert experiment_changes(experiment, {"experiment": begun}) == []


def test_images_and_videos_are_told_apart_where_a_model_returns_them():
    import torch

    images, videos = torch.rand(2, 3, 4, 4), torch.rand(2, 5, 3, 4, 4)
    contracts.check_images("m", images, 2, "image")
    contracts.check_images("m", videos, 2, "video")
    for given, media, message in (
        (
            videos,
            "image",
            r"shape \(2, 5, 3, 4, 4\) from 2 latents; \(2, 3, h, w\) was asked; its spec says media = 'im",
        ),
        (
            images,
            "video",
            r"shape \(2, 3, 4, 4\) from 2 latents; \(2, F, 3, h, w\) was asked; its spec says media = 'v",
        ),
        (videos.movedim(1, 2), "video", r"shape \(2, 3, 5, 4, 4\) from 2 latents; \(2, F, 3, h, w\) was asked$"),
        (videos[:, :0], "video", r"shape \(2, 0, 3, 4, 4\) from 2 latents"),
    ):
        with pytest.raises(ContractError, match=message):
            contracts.check_images("m", given, 2, media)


def test_the_world_of_videos_comes_in_by_the_door_alone():
    for name in ("video_world.py", "video_model.py"):
        source = (Path(video_world.__file__).parent / name).read_text()
        assert not [line for line in source.splitlines() if "import" in line and "aegpo." in line]
