"""What loading a file finds out about the last step's noise, prompts that no reward could score, and the optimizer."""

from __future__ import annotations

import json
import re

import pytest
from typer.testing import CliRunner

from aegpo.commands.cli import app
from aegpo.config.loading import load_experiment_file
from aegpo.errors import SpecError
from aegpo.plugin.manager import load_registries, plugin_manager

FILE = """\
name: x
training_steps: 2
model: shapes
rewards: [palette]
rollouts: {prompts_per_step: 2, rollouts_per_step: 8, denoising_steps: 6}
allocator: uniform
selector: uniform
tree: independent
sampler: flow-sde
advantage: group
objective: {kind: clipped, clip: 3.8e-3}
"""
GOOD = "two red circles and a blue square on a yellow background"


@pytest.fixture(scope="module")
def registries():
    return load_registries(plugin_manager())


@pytest.fixture
def load(tmp_path, registries):
    path = tmp_path / "x.yaml"
    path.write_text(FILE)
    return lambda *overrides: load_experiment_file(path, registries, overrides)


# --- the last step ---------------------------------------------------------------------------------------------------

LAST = "selector={kind: uniform, last: true}"
ADDS = "the last step adds noise that nothing takes out again: rewards see noise of std"
BLIND = "the last step is trained, but 'rollouts.decode: predicted-clean' paints what was predicted before its noise"


@pytest.mark.parametrize("sampler", ["flow-sde", "dance-sde"])
def test_noise_that_stays_in_every_image_is_told_with_its_size(load, sampler):
    (warning,) = load(LAST, f"sampler={sampler}").warnings
    assert ADDS in warning
    assert "x.yaml:7:" in warning or "--set" in warning  # where the selector was written
    (size,) = re.findall(r"noise of std (0\.\d+) in the latents", warning)
    assert 0.05 < float(size) < 0.5


def test_an_edge_that_no_reward_can_see_is_told(load):
    (warning,) = load(LAST, "rollouts.decode=predicted-clean").warnings
    assert BLIND in warning
    assert ADDS not in warning


@pytest.mark.parametrize(
    "overrides",
    [
        (),  # the last step is deterministic
        ("rollouts.decode=predicted-clean",),
        ("tree={kind: independent, noise: all}",),  # all but the last
        ("tree={kind: independent, noise: all}", "rollouts.decode=predicted-clean"),  # DanceGRPO
        (LAST, "tree={kind: independent, noise: none}", "objective={kind: nft}"),  # DiffusionNFT trains every level
    ],
    ids=["final", "clean", "all", "dance", "nft"],
)
def test_a_last_step_without_noise_or_of_the_forward_process_is_nothing_to_warn_of(load, overrides):
    assert load(*overrides).warnings == ()


# --- prompts ---------------------------------------------------------------------------------------------------------

NO_CAPTION = (
    "is not a sentence of the embedded world; one is 'two red circles and a blue square on a yellow background'"
)


def refused(load, *overrides) -> str:
    with pytest.raises(SpecError) as error:
        load(*overrides)
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "place"),
    [
        ("p.txt", f"{GOOD}\n\na cat\na dog\n", "line 3"),
        ("p.jsonl", "\n".join(json.dumps({"prompt": text}) for text in (GOOD, "a cat")), "line 2"),
        ("p.json", json.dumps([GOOD, GOOD, "a cat"]), "item 2"),
    ],
)
def test_a_prompt_that_no_reward_can_score_is_refused_at_load_with_its_place(load, tmp_path, name, content, place):
    (tmp_path / name).write_text(content)
    told = refused(load, f"prompts.train={tmp_path / name}")
    assert f"prompts.train: {tmp_path / name}, {place}: reward 'palette' cannot score this prompt: " in told
    assert f"caption 'a cat' {NO_CAPTION}" in told
    assert "a dog" not in told  # the first of a file is enough


def test_rewards_of_the_evaluation_are_asked_about_its_prompts_only(load, tmp_path):
    (tmp_path / "p.txt").write_text("a cat\n")
    (tmp_path / "t.txt").write_text("a dog\na cow\n")
    judged = "evaluation.rewards=[{kind: scene, name: judge}]"
    size = "rewards=[clip]"
    told = refused(
        load, size, judged, f"prompts.evaluation={tmp_path / 'p.txt'}", f"prompts.train={tmp_path / 't.txt'}"
    )
    assert "prompts.evaluation: " in told
    assert "line 1: reward 'judge' cannot score this prompt" in told
    assert "prompts.train" not in told


def test_prompts_that_no_step_takes_and_rewards_that_take_any_are_no_mistake(load, tmp_path):
    (tmp_path / "p.txt").write_text(f"{GOOD}\na cat\n")
    given = f"prompts.train={tmp_path / 'p.txt'}"
    alone = "rollouts.prompts_per_step=1"
    load(given, "prompts.train_count=1", alone)
    load(given, "rewards=[clip]")
    held_out = tmp_path / "held-out.txt"
    held_out.write_text("a cat\n")
    load(given, "rewards=[clip]", f"prompts.evaluation={held_out}", "prompts.shared=drop", alone)
    told = refused(load, given, f"prompts.evaluation={held_out}", "prompts.shared=drop", alone)
    assert "prompts.evaluation" in told
    assert "prompts.train:" not in told  # the cat is dropped from training


@pytest.mark.parametrize("reward", ["palette", "clip"])
def test_a_file_that_is_not_there_is_refused_at_load_whatever_the_reward(load, tmp_path, reward):
    told = refused(load, f"prompts.train={tmp_path / 'none.txt'}", f"rewards=[{reward}]")
    assert f"prompts.train: cannot read {tmp_path / 'none.txt'}: No such file or directory" in told


def test_check_names_the_line_of_both_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("a cat\n")
    (tmp_path / "x.yaml").write_text(FILE + "prompts:\n  train: p.txt\n")
    done = CliRunner().invoke(app, ["check", "x.yaml"])
    assert isinstance(done.exception, SpecError)
    told = f"x.yaml:13:10: prompts.train: {tmp_path / 'p.txt'}, line 1: reward 'palette' cannot score"
    assert told in str(done.exception)


# --- the optimizer ---------------------------------------------------------------------------------------------------


def optimizer_of(loaded):
    (experiment,) = loaded.arms.values()
    return experiment.optimizer


def test_a_bare_schedule_is_short_for_its_kind_and_can_be_patched(load):
    schedule = optimizer_of(load("optimizer.schedule=cosine")).schedule
    assert (schedule.kind, schedule.warmup, schedule.final) == ("cosine", 0, 0.0)
    assert optimizer_of(load("optimizer.schedule={kind: cosine}")).schedule == schedule
    warmed = optimizer_of(load("training_steps=9", "optimizer.schedule=cosine", "optimizer.schedule.warmup=2")).schedule
    assert (warmed.kind, warmed.warmup) == ("cosine", 2)
    assert load("optimizer.schedule=linear").warnings == load().warnings == ()


def test_another_kind_of_optimizer_keeps_how_a_step_is_dealt_out_to_it(load, tmp_path):
    (tmp_path / "x.yaml").write_text(
        FILE + "optimizer: {kind: adamw, rollouts_per_update: 4, learning_rate: 0.001}\n"
        "arms:\n  plain: {}\n  descent:\n    optimizer: {kind: sgd, learning_rate: 0.1}\n"
    )
    arms = load().arms
    assert arms["plain"].optimizer.kind == "adamw"
    found = arms["descent"].optimizer
    assert (found.kind, found.rollouts_per_update, found.learning_rate) == ("sgd", 4, 0.1)
    everywhere = load("optimizer.kind=adam").arms
    assert {(arm.optimizer.kind, arm.optimizer.rollouts_per_update) for arm in everywhere.values()} == {("adam", 4)}


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (("optimizer.kind=adamax",), "optimizer.kind: unknown kind 'adamax'; did you mean 'adam'?"),
        (("optimizer.schedule=cosin",), "optimizer.schedule: unknown kind 'cosin'; did you mean 'cosine'?"),
        (("optimizer.schedule={warmup: -1}",), "optimizer.schedule.warmup: must be at least 0, not -1"),
        (("optimizer.schedule={warmup: 1.5}",), "optimizer.schedule.warmup: must be a whole number, not 1.5"),
        (("optimizer.schedule={final: 2}",), "optimizer.schedule.final: must be at most 1, not 2"),
        (
            ("optimizer={kind: sgd, moments: 8bit}",),
            "optimizer.moments: '8bit' is for the two moments of adamw and adam; use float32, or one of these as",
        ),
        (
            ("optimizer.schedule={kind: linear, warmup: 1}",),
            "optimizer.schedule: no way down for 'linear' after a warm-up of 1: the run makes 2 optimizer "
            "updates at most, and it takes 3 or more; lower 'warmup', raise 'training_steps', or use constant",
        ),
    ],
)
def test_an_optimizer_that_cannot_be_is_refused_with_its_place_and_what_would_be_right(load, overrides, told):
    assert told in refused(load, *overrides)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        (
            "optimizer={kind: sgd, betas: [0.9, 0.99]}",
            "optimizer.betas: has no effect under 'kind: sgd'; remove it, or choose 'kind' adamw or adam",
        ),
        ("optimizer={kind: sgd, epsilon: 0.1}", "optimizer.epsilon: has no effect under 'kind: sgd'; remove it"),
        (
            "optimizer={momentum: 0.5}",
            "optimizer.momentum: has no effect under 'kind: adamw'; remove it, or choose 'kind' sgd",
        ),
        ("optimizer={kind: adam, momentum: 0.5}", "optimizer.momentum: has no effect under 'kind: adam'; remove it"),
        (
            "optimizer.schedule={final: 0.5}",
            "optimizer.schedule.final: has no effect under 'kind: constant'; remove it, or choose 'kind' cosine or",
        ),
        (
            "optimizer.schedule={warmup: 2}",
            "optimizer.schedule.warmup: the learning rate never reaches its peak: the run makes 2 optimizer updates at "
            "most; lower it to 1 or less",
        ),
    ],
)
def test_what_has_no_effect_under_the_chosen_optimizer_is_told_with_its_place(load, override, told):
    (warning,) = load(override).warnings
    assert told in warning
    assert load("optimizer={kind: sgd, momentum: 0.5}").warnings == ()


# --- metadata --------------------------------------------------------------------------------------------------------


@pytest.fixture
def load_wanted(tmp_path):
    """Loads the file with a reward that reads metadata."""
    registries = load_registries(plugin_manager(["wanted_brightness"]))
    (tmp_path / "x.yaml").write_text(FILE.replace("[palette]", "[clip]"))
    return lambda *overrides: load_experiment_file(tmp_path / "x.yaml", registries, overrides)


def rows(what: str, *metadata) -> str:
    return "".join(json.dumps({"prompt": f"a {what} {number}"} | each) + "\n" for number, each in enumerate(metadata))


WANTED = "rewards=[{kind: wanted-brightness, name: wanted}]"


@pytest.mark.parametrize(
    ("row", "there"),
    [({}, "no metadata"), ({"brightness": None}, "no metadata"), ({"style": "x", "id": 3}, "only 'style', 'id'")],
)
def test_metadata_that_a_reward_needs_and_a_prompt_lacks_is_told_at_load_with_its_line(
    load_wanted, tmp_path, row, there
):
    for name in ("train", "held-out"):
        (tmp_path / f"{name}.jsonl").write_text(rows(name, {"brightness": 1}, {"brightness": 0.5}, row, {}))
    files = (f"prompts.train={tmp_path / 'train.jsonl'}", f"prompts.evaluation={tmp_path / 'held-out.jsonl'}")
    told = refused(load_wanted, WANTED, *files)
    for split, name in (("train", "train"), ("evaluation", "held-out")):
        where = f"prompts.{split}: {tmp_path / name}.jsonl, line 3"
        assert f"{where}: reward 'wanted' needs 'brightness', but this prompt has {there}\n" in told + "\n"
    assert "line 4" not in told  # the first of a file is enough
    load_wanted(WANTED, *files, "prompts.train_count=2", "prompts.evaluation_count=2")
    told = refused(load_wanted, "evaluation.rewards=[wanted-brightness]", *files)
    assert "prompts.evaluation: " in told
    assert "prompts.train" not in told  # a guard reads held-out prompts alone


def test_captions_have_what_their_model_says_and_files_of_lines_no_metadata(load_wanted, tmp_path):
    told = refused(load_wanted, WANTED)
    for split in ("train", "evaluation"):
        assert (
            "reward 'wanted' needs 'brightness', but captions of model 'shapes' have only 'kind'; name a file that has "
            f"it as '{split}'"
        ) in told
    (tmp_path / "p.txt").write_text("a cat\n")
    told = refused(
        load_wanted, WANTED, f"prompts.train={tmp_path / 'p.txt'}", f"prompts.evaluation={tmp_path / 'p.txt'}"
    )
    assert "p.txt, line 1: reward 'wanted' needs 'brightness', but this prompt has no metadata" in told


def test_a_reward_whose_refusals_are_of_the_first_edition_is_blamed_at_load(tmp_path):
    (tmp_path / "old.py").write_text(OLD_REWARD)
    (tmp_path / "p.txt").write_text("a cat\n")
    (tmp_path / "x.yaml").write_text(FILE.replace("[palette]", "[old]"))
    registries = load_registries(plugin_manager([str(tmp_path / "old.py")]))
    with pytest.raises(
        SpecError, match="reward 'old' failed with AttributeError: 'Prompt' object has no attribute 'sp"
    ):
        load_experiment_file(tmp_path / "x.yaml", registries, [f"prompts.train={tmp_path / 'p.txt'}"])


OLD_REWARD = """
from typing import ClassVar, Literal

import aegpo


class Old(aegpo.RewardSpec):
    '''Takes prompts for strings.'''

    kind: Literal["old"] = "old"
    particular: ClassVar[bool] = True

    def score(self, images, prompts):
        return images.mean(dim=(1, 2, 3))

    def refuses(self, prompt):
        return None if prompt.split() else "has no words"


@aegpo.hookimpl
def aegpo_register_rewards(registry):
    registry.add(Old)
"""
