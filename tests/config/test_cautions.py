"""What loading a file finds out about the last step's noise, and about prompts that no reward could score."""

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
    judged = "evaluation.rewards=[{kind: scene, name: judge}]"
    size = "rewards=[clip]"
    told = refused(
        load, size, judged, f"prompts.evaluation={tmp_path / 'p.txt'}", f"prompts.train={tmp_path / 'p.txt'}"
    )
    assert "prompts.evaluation: " in told
    assert "line 1: reward 'judge' cannot score this prompt" in told
    assert "prompts.train" not in told


def test_prompts_that_no_step_takes_and_rewards_that_take_any_are_no_mistake(load, tmp_path):
    (tmp_path / "p.txt").write_text(f"{GOOD}\na cat\n")
    given = f"prompts.train={tmp_path / 'p.txt'}"
    load(given, "prompts.train_count=1")
    load(given, "rewards=[clip]")
    held_out = tmp_path / "held-out.txt"
    held_out.write_text("a cat\n")
    load(given, "rewards=[clip]", f"prompts.evaluation={held_out}", "prompts.shared=drop")
    told = refused(load, given, f"prompts.evaluation={held_out}", "prompts.shared=drop")
    assert "prompts.evaluation" in told
    assert "prompts.train:" not in told  # the cat is dropped from training


def test_a_file_that_is_not_there_is_refused_at_load_where_a_reward_is_particular(load, tmp_path):
    told = refused(load, f"prompts.train={tmp_path / 'none.txt'}")
    assert f"prompts.train: cannot read {tmp_path / 'none.txt'}: No such file or directory" in told
    load(f"prompts.train={tmp_path / 'none.txt'}", "rewards=[clip]")


def test_check_names_the_line_of_both_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("a cat\n")
    (tmp_path / "x.yaml").write_text(FILE + "prompts:\n  train: p.txt\n")
    done = CliRunner().invoke(app, ["check", "x.yaml"])
    assert isinstance(done.exception, SpecError)
    assert "x.yaml:13:10: prompts.train: p.txt, line 1: reward 'palette' cannot score" in str(done.exception)
