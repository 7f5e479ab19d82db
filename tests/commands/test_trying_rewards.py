"""`aegpo check --rewards`: the scores of images whose order is known, and what is said where none is."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from command_line import aegpo as command
from pydantic import Field
from repository import ROOT

import aegpo
from aegpo.rewards.diversity import DiversityReward
from aegpo.rewards.palette import PaletteReward
from aegpo.rewards.scene import SceneReward
from aegpo.testing import check_reward

PLUGIN = """
from typing import Literal

import numpy as np

import aegpo


class Blue(aegpo.RewardSpec):
    'How blue an image is.'

    kind: Literal["blue"] = "blue"

    def score(self, images, prompts):
        return images[:, 2].mean(dim=(1, 2))


class Dark(Blue):
    'How dark an image is; but it has the sign wrong.'

    kind: Literal["dark"] = "dark"

    def examples(self):
        return aegpo.Examples(aegpo.Prompt(0, "night"), np.zeros((1, 3, 8, 8)), np.ones((1, 3, 8, 8)))


@aegpo.hookimpl
def aegpo_register_rewards(registry):
    registry.add(Blue)
    registry.add(Dark)
"""
EXPERIMENT = "model: shapes\nrewards: [palette, blue]\nevaluation: {rewards: [%s]}\nprompts: {evaluation_count: 2}\n"


def test_each_reward_of_a_file_is_tried_once():
    done = command("check", str(ROOT / "experiments" / "smoke.yaml"), "--rewards")
    assert done.code == 0, done.stderr
    tried = [line for line in done.stdout.splitlines() if "for an image that should score high, above" in line]
    assert [line.partition(":")[0] for line in tried] == ["strict", "scene", "palette", "diversity"]


def test_a_reward_of_which_no_pair_is_known_scores_a_plain_image_and_one_in_the_wrong_order_is_an_error(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("blue.py").write_text(PLUGIN)
    Path("x.yaml").write_text(EXPERIMENT % "{kind: blue, name: again}")
    done = command("check", "x.yaml", "--rewards", "--plugin", "blue.py")
    assert done.code == 0, done.stderr
    assert "blue: a plain grey image scores 0.5; no pair of images is known to try it with\n" in done.stdout
    assert "again: a plain grey image scores 0.5" in done.stdout
    Path("x.yaml").write_text(EXPERIMENT % "dark")
    done = command("check", "x.yaml", "--rewards", "--plugin", "blue.py")
    assert done.code == 2
    assert "dark: 0 for an image that should score high, NOT above 1 for one that should not\n" in done.stdout
    assert done.stderr.startswith("error: dark: the image that should score low scores at least as high, so training")
    assert "plain grey" not in command("check", "x.yaml", "--plugin", "blue.py").stdout


@pytest.mark.parametrize("spec", [SceneReward(), SceneReward(strict=True), PaletteReward(), DiversityReward()])
def test_examples_of_shipped_rewards_are_in_their_order(spec):
    assert isinstance(spec, aegpo.Exemplary)
    check_reward(spec)


class Offering(aegpo.RewardSpec):
    """How bright an image is."""

    kind: Literal["offering"] = "offering"
    high: float = Field(1.0, description="of the image that should score high")
    low: float = Field(0.0, description="of the other")
    channels: int = Field(3, description="of both")

    def score(self, images, prompts):
        return images.mean(dim=(1, 2, 3))

    def examples(self):
        high, low = (np.full((1, self.channels, 8, 8), value) for value in (self.high, self.low))
        return aegpo.Examples(aegpo.Prompt(0, "day"), high, low)


def test_check_reward_holds_examples_to_what_they_promise():
    check_reward(Offering())
    with pytest.raises(aegpo.ContractError, match=r"but scores the one that should be high 0\.25, the other 0\.25"):
        check_reward(Offering(high=0.25, low=0.25))
    with pytest.raises(aegpo.ContractError, match=r"of shape \(1, 3, 8, 8\); images are .* in \[0, 1\]"):
        check_reward(Offering(high=2.0))
    with pytest.raises(aegpo.ContractError, match=r"offers examples of shape \(1, 1, 8, 8\)"):
        check_reward(Offering(channels=1))
