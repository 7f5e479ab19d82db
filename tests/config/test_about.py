"""What an arm does in one sentence: where files say it, who inherits it, and what is wrong with one."""

from __future__ import annotations

import pytest
from repository import ROOT
from test_loading import BASE, complaint, load

from aegpo.config.loading import load_experiment_file
from aegpo.config.schema import file_schema
from aegpo.core.verdicts import VerdictSpec
from aegpo.plugin.manager import load_registries, plugin_manager
from aegpo.runs.tracking.services import SERVICES, Place

ARMS = "extends: base.yaml\narms: {grpo: {}, aegpo: {selector: random, about: both}, control: {allocator: random}}\n"


@pytest.fixture(scope="module")
def registries():
    return load_registries(plugin_manager())


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yaml").write_text(BASE + "about: the reference\n")
    return tmp_path


def about(file):
    return {arm: experiment.about for arm, experiment in file.arms.items()}


def test_words_about_the_base_are_not_about_an_arm_that_changes_it(folder, registries):
    assert about(load(ARMS, registries)) == {"grpo": "the reference", "aegpo": "both", "control": None}
    assert about(load_experiment_file(folder / "base.yaml", registries)) == {"main": "the reference"}


def test_an_arm_that_only_says_what_it_does_is_the_base_all_the_same(folder, registries):
    arms = load("extends: base.yaml\narms: {one: {about: mine}, two: {}}", registries).arms
    assert arms["one"].model_copy(update={"about": None}) == arms["two"].model_copy(update={"about": None})


def test_an_option_says_it_of_every_arm(folder, registries):
    assert set(about(load(ARMS, registries, "about=all alike")).values()) == {"all alike"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ('""', "must say something, not nothing; or leave it out"),
        ('"two\\nlines"', "must be one line without spaces around it; a longer sentence goes on under '>-'"),
        ("3", "must be text"),
        ("x" * 301, "300"),
    ],
)
def test_what_is_no_sentence_is_told_with_its_place(folder, registries, given, message):
    told = complaint(f"extends: base.yaml\narms: {{one: {{about: {given}}}}}", registries)
    assert "2:" in told
    assert "about" in told
    assert message in told


def test_a_control_is_compared_once_and_after_the_others(folder, registries):
    verdict = load(ARMS + "controls: {aegpo: control}\n", registries).verdict
    assert verdict == VerdictSpec(controls={"aegpo": "control"})
    assert verdict.pairs(("grpo", "aegpo", "control"))[-1] == ("aegpo", "control")
    named = load(ARMS + "controls: {aegpo: control}\ncomparisons: [[aegpo, control]]\n", registries).verdict
    assert named.pairs(("grpo", "aegpo", "control")) == (("aegpo", "control"),)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("{aegpo: contrl}", "no arm is called 'contrl'; did you mean 'control'?"),
        ("{aegp: control}", "no arm is called 'aegp'; did you mean 'aegpo'?"),
        ("{aegpo: aegpo}", "arm 'aegpo' is no control of itself; name the arm that it is compared to"),
        ("{grpo: aegpo}", "'aegpo' is compared with 'grpo' already, the other way round; keep one of the two"),
        ("[aegpo, control]", "must be"),
        ("{}", "at least 1"),
    ],
)
def test_a_control_that_is_none_is_told_with_its_place(folder, registries, asked, message):
    told = complaint(f"{ARMS}controls: {asked}", registries)
    assert "3:" in told
    assert "controls" in told
    assert message in told


def test_every_arm_that_ships_says_what_it_does(registries):
    silent = [
        f"{path.stem} {arm}"
        for path in sorted((ROOT / "experiments").glob("*.yaml"))
        for arm, words in about(load_experiment_file(path, registries)).items()
        if words is None
    ]
    assert silent == []


def test_editors_know_it(registries):
    fields = file_schema(registries)["properties"]
    assert fields["about"]["description"]
    assert "about" in fields["arms"]["additionalProperties"]["properties"]


def test_what_an_arm_does_stands_where_services_have_a_place_for_it(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_NOTES", raising=False)
    place = Place("tiny", "main", "main/seed-0", (), "1", False, tmp_path, True, about="What this arm does.")
    assert SERVICES["wandb"].options(place)["notes"] == "What this arm does."
    assert SERVICES["swanlab"].options(place)["description"] == "What this arm does."
