"""Rewards of images under a model of videos: what becomes of the scores of frames."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import pytest
import torch
import video_world
from test_scoring import CPU, Brighter, Flaky, Noted, NotedBrighter, Scribbler, scored_early
from torch import Tensor
from worlds import BrightnessReward, asked, small_experiment

from aegpo.core.parts import RewardSpec
from aegpo.core.records import Gaussian, Prompt
from aegpo.core.sections import OptimizerSpec, RolloutsSpec, TailSpec
from aegpo.errors import ContractError, RewardError
from aegpo.method.objectives import ClippedObjective
from aegpo.method.samplers import FlowSde
from aegpo.plugin.manager import load_registries, plugin_manager
from aegpo.testing import check_model, check_reward, check_sampler
from aegpo.train.engine import Engine
from aegpo.train.held_out import HeldOut
from aegpo.train.scoring import build_scorers, score

REGISTRIES = load_registries(plugin_manager(["video_world"]))
VIDEOS = torch.rand((6, 4, 3, 6, 6), generator=torch.Generator().manual_seed(0))
PROMPTS = asked("abacbc")
SMALL = RolloutsSpec(prompts_per_step=2, rollouts_per_step=8, denoising_steps=6)


class Contiguous(RewardSpec):
    """Scores images only as most libraries want them."""

    kind: Literal["contiguous"] = "contiguous"

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return images.view(len(images), -1).mean(dim=1)


def scored(*specs: RewardSpec, videos: Tensor = VIDEOS) -> dict[str, Tensor]:
    return score(build_scorers(specs, CPU), videos, PROMPTS)


def test_scores_of_frames_become_one_as_the_reward_says():
    specs = [BrightnessReward(name=rule, frames=rule) for rule in ("mean", "min", "first")]
    found, frames = scored(*specs), VIDEOS.mean(dim=(2, 3, 4))
    torch.testing.assert_close(found["mean"], frames.mean(dim=1))
    torch.testing.assert_close(found["min"], frames.amin(dim=1))
    torch.testing.assert_close(found["first"], frames[:, 0])


def test_a_reward_of_videos_is_given_them_whole():
    found = scored(video_world.Motion(), video_world.Light(), video_world.Light(name="framed", frames="mean"))
    torch.testing.assert_close(found["motion"], VIDEOS.diff(dim=1).abs().mean(dim=(1, 2, 3, 4)))
    torch.testing.assert_close(found["light"], found["framed"])


def test_frames_are_images_like_any_others_to_a_reward():
    assert torch.equal(
        scored(Contiguous(frames="first"))["contiguous"],
        score(build_scorers([Contiguous()], CPU), VIDEOS[:, 0].contiguous(), PROMPTS)["contiguous"],
    )
    assert len(scored(Contiguous(frames="min"))["contiguous"]) == 6


def test_frames_are_compared_with_those_of_the_same_time_and_not_with_their_own():
    each = [score(build_scorers([Brighter()], CPU), VIDEOS[:, time], PROMPTS)["brighter"] for time in range(4)]
    assert torch.equal(scored(Brighter(frames="mean"))["brighter"], torch.stack(each).mean(dim=0))
    assert torch.equal(scored(Brighter(frames="min"))["brighter"], torch.stack(each).amin(dim=0))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_reward_elsewhere_scores_frames_early_and_the_same(size):
    Noted.asked.clear()
    specs = [Noted(micro_batch=2, frames="mean"), BrightnessReward(name="here", frames="mean")]
    found = scored_early(specs, VIDEOS, PROMPTS, size)
    assert torch.equal(found["brightness"], found["here"])
    assert set(Noted.asked) <= {2, 4}  # whole micro-batches, never more than there are videos
    assert sum(Noted.asked) == 6 * 4


def test_the_first_frame_is_all_that_is_asked_about_where_it_is_enough():
    Noted.asked.clear()
    scored(Noted(micro_batch=32, frames="first"))
    assert Noted.asked == [6]


def test_a_group_wise_reward_elsewhere_is_asked_once_a_prompt_is_complete():
    NotedBrighter.seen.clear()
    found = scored_early([NotedBrighter(frames="mean")], VIDEOS, PROMPTS, 1)
    assert NotedBrighter.seen == [["a", "a"]] * 4 + [["b", "b"]] * 4 + [["c", "c"]] * 4
    assert torch.equal(found["brighter"], scored(Brighter(frames="mean"))["brighter"])


def test_a_reward_that_fails_or_scribbles_at_a_frame_is_blamed():
    Flaky.left[0] = 2
    with pytest.raises(RewardError, match="reward 'brightness' failed with ConnectionError: the server is gone"):
        scored(Flaky(frames="mean"))
    with pytest.raises(RewardError, match="reward 'brightness' changed the images in place"):
        scored(Scribbler(frames="mean"))


def test_held_out_videos_are_compared_with_those_of_the_base():
    prompts = asked("ab")
    held_out = HeldOut(build_scorers([Brighter(frames="mean")], CPU), prompts, lambda _: VIDEOS[:2])
    scores, base_scores, images = held_out.evaluate(lambda _: (VIDEOS[:2] + 0.1).clamp(0, 1))
    assert images.shape == (2, 4, 3, 6, 6)
    assert scores["brighter"].tolist() == [1.0, 1.0]
    assert base_scores["brighter"].tolist() == [0.0, 0.0]


# --- the world of videos ----------------------------------------------------------------------------------------------


def test_the_model_and_the_rewards_of_videos_conform():
    check_model(video_world.TinyVideos(), video_world.CAPTIONS[:2])
    for spec in (video_world.Motion(), video_world.Light(), video_world.Redness(), video_world.Redness(frames="min")):
        check_reward(spec)


def test_parts_that_take_images_for_granted_do_not_conform():
    class Frameless(FlowSde):
        """Takes latents of images for granted."""

        kind: Literal["frameless"] = "frameless"  # type: ignore[assignment]

        def transition(
            self, latents: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor, scale: Tensor | None = None
        ) -> Gaussian:
            a, b, std = self.coefficients(sigma.float(), sigma_next.float(), scale)
            return Gaussian(a.view(-1, 1, 1, 1) * latents + b.view(-1, 1, 1, 1) * velocity, std)

    class OfFour(video_world.Motion):
        """Knows how many frames there are."""

        kind: Literal["of-four"] = "of-four"  # type: ignore[assignment]

        def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
            return images[:, :3].reshape(len(images), 3, -1).mean(dim=(1, 2)) / (images.shape[1] - 4)

    class Still(video_world.TinyVideos):
        """Says that it paints images."""

        kind: Literal["still"] = "still"  # type: ignore[assignment]
        media: ClassVar[Literal["image"]] = "image"  # type: ignore[assignment]

    with pytest.raises(
        ContractError, match=r"sampler 'frameless' returned a mean of shape \(4, 4, 2, 3, 3\), float32;"
    ):
        check_sampler(Frameless())
    with pytest.raises(ContractError, match="reward 'of-four' returned a non-finite score"):
        check_reward(OfFour(), frames=4)
    check_reward(OfFour(), frames=3)
    with pytest.raises(ContractError, match=r"; \(2, 3, h, w\) was asked; its spec says media = 'image'"):
        check_model(Still(), video_world.CAPTIONS[:2])


def stepped(**changes: object) -> dict[str, float]:
    """The metrics of a training step on videos."""
    experiment = small_experiment(
        video_world.TinyVideos(), **{"rollouts": SMALL, "rewards": (video_world.Motion(),), **changes}
    )
    assert not [each.message for each in experiment.problems() if not each.warning]
    engine = Engine.build(experiment)
    before = {name: value.clone() for name, value in engine.policy.weights.trained.items()}
    metrics = dict(engine.step(1).metrics)
    assert any(not torch.equal(value, before[name]) for name, value in engine.policy.weights.trained.items())
    return metrics


@pytest.mark.parametrize("kind", REGISTRIES.objectives.names)
def test_every_objective_learns_from_videos(kind):
    objective = REGISTRIES.objectives.get(kind)()
    assert stepped(objective=objective)["updated_edges"] > 0


@pytest.mark.parametrize("kind", REGISTRIES.samplers.names)
def test_every_sampler_takes_steps_of_videos(kind):
    sampler = REGISTRIES.samplers.get(kind)()
    assert stepped(sampler=sampler, objective=ClippedObjective(clip=1e-3))["updated_edges"] > 0


@pytest.mark.parametrize("kind", REGISTRIES.trees.names)
def test_every_tree_grows_over_videos_with_the_fast_ending(kind):
    selector = REGISTRIES.selectors.get("window")(width=2)
    rollouts = SMALL.model_copy(update={"tail": TailSpec(ratio=1.0)})
    tree = REGISTRIES.trees.get(kind)()
    assert stepped(tree=tree, selector=selector, rollouts=rollouts)["updated_edges"] > 0


def test_small_batches_of_videos_are_the_same_step():
    split = {"rollouts": SMALL.model_copy(update={"micro_batch": 3}), "optimizer": OptimizerSpec(micro_batch=5)}
    rewards = (video_world.Motion(), video_world.Redness(frames="mean"))
    whole, parts = stepped(rewards=rewards), stepped(rewards=rewards, **split)
    assert parts == pytest.approx(whole, rel=1e-4, abs=1e-5)
