"""Metadata of prompts: it reaches the rewards of a run, and where a reward needs some that is not there it is said."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from test_engine import run
from torch import Tensor
from wanted_brightness import WantedBrightness
from worlds import BrightnessReward, GaussianSpec, asked, small_experiment

from aegpo.core.parts import RewardSpec
from aegpo.core.records import Prompt
from aegpo.core.sections import DatasetPrompts, PromptsSpec
from aegpo.errors import AegpoError, ContractError, RewardError
from aegpo.prompts.problems import problems
from aegpo.report.profile.evidence import measure_reward_std, rewards_at
from aegpo.report.profile.groups import group_values
from aegpo.report.profile.target import ProfileRequest, find_target
from aegpo.testing import check_reward
from aegpo.train.engine import Engine
from aegpo.train.held_out import HeldOut
from aegpo.train.scoring import build_scorers, score

CPU = torch.device("cpu")
IMAGES = torch.rand((3, 3, 6, 6), generator=torch.Generator().manual_seed(0))


class Noting(WantedBrightness):
    """Notes the prompts it is asked about."""

    noted: ClassVar[list[Prompt]] = []

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        self.noted.extend(prompts)
        return super().score(images, prompts)


def write(path: Path, numbers: range, **more: object) -> Path:
    """A file of the Gaussian world's prompts; the brightness that is wanted of each."""
    rows = [{"prompt": f"{number / 10:.2f}", "brightness": number / 10, **more} for number in numbers]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def prompts(tmp_path) -> PromptsSpec:
    train, held_out = write(tmp_path / "train.jsonl", range(4), of="train"), tmp_path / "held-out.jsonl"
    return PromptsSpec(train=train, evaluation=write(held_out, range(5, 7), of="evaluation"))


def test_training_and_evaluation_give_rewards_the_metadata_of_their_files(prompts, tmp_path):
    Noting.noted.clear()
    run(small_experiment(GaussianSpec(), rewards=(Noting(),), prompts=prompts), tmp_path)
    found = {(each.index, each.text, each.metadata["of"]) for each in Noting.noted}
    assert found == {
        *((number, f"{number / 10:.2f}", "train") for number in range(4)),
        *((number - 5, f"{number / 10:.2f}", "evaluation") for number in (5, 6)),
    }
    assert all(each.metadata["brightness"] == float(each.text) for each in Noting.noted)


def test_a_run_on_metadata_is_the_run_of_a_reward_that_knows_it_from_the_text(prompts, tmp_path):
    class FromText(BrightnessReward):
        def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
            return -(images.mean(dim=(1, 2, 3)) - images.new_tensor([float(each.text) for each in prompts])).abs()

    found = [
        run(small_experiment(GaussianSpec(), rewards=(reward,), prompts=prompts), tmp_path / reward.kind)[1].reports
        for reward in (WantedBrightness(name="same"), FromText(name="same"))
    ]
    assert [each.metrics for each in found[0]] == [each.metrics for each in found[1]]


def test_a_held_out_prompt_has_its_metadata_beside_the_base_policy_too():
    class Compared(Noting):
        group_wise: ClassVar[bool] = True

    Noting.noted.clear()
    scorers = build_scorers([Compared()], CPU)
    dark, bright = asked(["dark"], brightness=0.0)[0], asked(["bright"], brightness=1.0)[0]
    held_out = HeldOut(scorers, (dark, bright), lambda _: IMAGES[:2])
    scores, base_scores, _ = held_out.evaluate(lambda _: IMAGES[1:])
    assert Noting.noted == [dark, bright, dark, bright]
    means = IMAGES.double().mean(dim=(1, 2, 3)).tolist()
    assert scores["wanted-brightness"].tolist() == pytest.approx([-means[1], means[2] - 1], abs=1e-6)
    assert base_scores["wanted-brightness"].tolist() == pytest.approx([-means[0], means[1] - 1], abs=1e-6)


def test_a_dataset_without_what_a_reward_needs_is_refused_before_the_first_step(tmp_path):
    pytest.importorskip("datasets")
    rows = [{"prompt": f"{number / 10:.2f}", "brightness": 0.5 if number < 3 else None} for number in range(4)]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    source = DatasetPrompts(dataset=str(tmp_path), file="train.json")
    own = (WantedBrightness(name="wanted"),)
    lacking = "prompt '0.30': reward 'wanted' needs 'brightness', but this prompt has no metadata"
    with pytest.raises(AegpoError) as error:
        Engine.build(small_experiment(GaussianSpec(), rewards=own, prompts=PromptsSpec(train=source)))
    assert str(error.value) == f"prompts.train: {lacking}"
    enough = PromptsSpec(train=source, train_count=3, evaluation=write(tmp_path / "held-out.jsonl", range(5, 7)))
    Engine.build(small_experiment(GaussianSpec(), rewards=own, prompts=enough)).step(1)


def test_captions_have_no_metadata_which_a_run_says_before_its_first_step():
    with pytest.raises(AegpoError, match=r"prompts\.train: prompt '0.00': reward 'wanted-brightness' needs 'bright"):
        Engine.build(small_experiment(GaussianSpec(), rewards=(WantedBrightness(),)))


def test_validation_of_the_entropy_gives_rewards_metadata(prompts):
    engine = Engine.build(small_experiment(GaussianSpec(), rewards=(Noting(),), prompts=prompts))
    held_out = asked(("0.50", "0.60"), brightness=0.25)
    for measured in (
        lambda: rewards_at(engine, held_out),
        lambda: measure_reward_std(engine, held_out, np.arange(2), 2, lambda line: None),
        lambda: group_values(engine, held_out, lambda line: None),
    ):
        Noting.noted.clear()
        measured()
        assert {each.text: each for each in Noting.noted} == {each.text: each for each in held_out}


def test_prompts_to_validate_on_must_have_what_the_rewards_need(tmp_path):
    from aegpo.plugin.manager import load_registries, plugin_manager

    registries = load_registries(plugin_manager(["wanted_brightness"]))
    sources = {split: write(tmp_path / f"{split}.jsonl", numbers) for split, numbers in SPLITS.items()}
    (tmp_path / "x.yaml").write_text(
        f"name: x\nmodel: shapes\nrewards: [wanted-brightness]\n"
        f"prompts: {{train: {sources['train']}, evaluation: {sources['evaluation']}}}\n"
        "rollouts: {prompts_per_step: 2, rollouts_per_step: 8}\n"
    )
    (tmp_path / "mine.txt").write_text("a red circle\n")
    request = ProfileRequest(tmp_path / "x.yaml", tmp_path / "mine.txt", validate=True)
    with pytest.raises(AegpoError, match="prompt 'a red circle': reward 'wanted-brightness' needs 'brightness', but "):
        find_target(request, registries)
    target = find_target(ProfileRequest(tmp_path / "x.yaml", validate=True), registries)
    assert [each.metadata for each in target.prompts] == [{"brightness": 0.5}, {"brightness": 0.6}]
    assert target.texts == ("0.50", "0.60")


SPLITS = {"train": range(5), "evaluation": range(5, 7)}


# --- what plugins are told -------------------------------------------------------------------------------------------


def test_a_reward_that_reads_metadata_conforms_on_prompts_that_have_it():
    prompts = [Prompt(0, text, {"brightness": 0.1 * number}) for number, text in enumerate("abcd")]
    check_reward(WantedBrightness(), prompts)
    with pytest.raises(ContractError, match="needs 'brightness', but this prompt has only 'kind'; give check_reward "):
        check_reward(WantedBrightness())
    with pytest.raises(ContractError, match=r"prompt 'b': .* but this prompt has only 'target'; give check_reward "):
        check_reward(WantedBrightness(), [prompts[0], Prompt(1, "b", {"target": 1, "brightness": None}), prompts[2]])


def reward_of(edition: str, read) -> RewardSpec:
    class Plugin(BrightnessReward):
        def score(self, images: Tensor, prompts) -> Tensor:
            assert [read(prompt) for prompt in prompts]
            return super().score(images, prompts)

    return Plugin(name=edition)


OLD = "; it was written for aegpo 0.1, whose prompts were strings: use prompt.text"


@pytest.mark.parametrize(
    "read",
    [
        lambda prompt: prompt.lower(),
        lambda prompt: prompt.split(" "),
        lambda prompt: "red " + prompt,
        lambda prompt: " ".join([prompt]),
        lambda prompt: "red" in prompt,
        lambda prompt: prompt[0],
        lambda prompt: len(prompt),
        lambda prompt: json.dumps(prompt),
        lambda prompt: {"one": 1, "two": 2}[prompt],
    ],
    ids=["lower", "split", "+", "join", "in", "[]", "len", "json", "key"],
)
def test_a_reward_of_the_first_edition_is_told_what_to_write_now(read):
    with pytest.raises(RewardError) as error:
        score(build_scorers([reward_of("old", read)], CPU), IMAGES[:2], asked(("one", "two")))
    assert str(error.value).startswith("reward 'old' failed with ")
    assert str(error.value).endswith(OLD)


def test_a_tokenizer_that_is_given_prompts_is_a_reward_of_the_first_edition_too():
    from transformers import PreTrainedTokenizerFast

    from aegpo.models.shapes import WEIGHTS

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(WEIGHTS / "tokenizer" / "tokenizer.json"))
    for read in (tokenizer, tokenizer.backend_tokenizer.encode):
        with pytest.raises(RewardError) as error:
            score(build_scorers([reward_of("old", read)], CPU), IMAGES[:2], asked(("one", "two")))
        assert str(error.value).endswith(OLD)


def too_long(prompt: Prompt) -> bool:
    raise ValueError("Prompt is longer than 77 tokens")


@pytest.mark.parametrize(
    "read",
    [
        lambda prompt: prompt.metadata["count"],
        lambda prompt: prompt.texts,
        lambda prompt: prompt.text + 1,
        lambda prompt: int(prompt.text),
        lambda prompt: {}[prompt.text],
        too_long,
    ],
    ids=["metadata", "attribute", "+", "int", "key", "length"],
)
def test_other_failures_of_a_reward_are_not_put_down_to_its_edition(read):
    with pytest.raises(RewardError, match="reward 'new' failed with ") as error:
        score(build_scorers([reward_of("new", read)], CPU), IMAGES[:2], asked(("one", "two")))
    assert "0.1" not in str(error.value)


class Telling(GaussianSpec):
    """A world whose captions say what brightness is wanted of them."""

    caption_metadata: ClassVar[tuple[str, ...]] = ("brightness",)

    def captions(self, split, count, seed):
        texts = super().captions(split, count, seed)
        return tuple(Prompt(0, text, {"brightness": float(text)}) for text in texts)


def test_captions_of_a_model_may_have_metadata(tmp_path):
    Noting.noted.clear()
    experiment = small_experiment(Telling(), rewards=(Noting(),))
    assert [problem for problem in problems(experiment) if not problem.warning] == []
    run(experiment, tmp_path)
    assert {each.metadata["brightness"] == float(each.text) for each in Noting.noted} == {True}
    assert len({each.index for each in Noting.noted}) > 2
    bare = small_experiment(GaussianSpec(), rewards=(Noting(),))
    assert "captions of model 'gaussian' have no metadata" in next(problems(bare)).message
