"""What a file asks of its report: comparisons, margin and target, and what is wrong with them, with its place."""

from __future__ import annotations

import pytest
from test_loading import BASE, complaint, load

from aegpo.config.schema import file_schema
from aegpo.core.verdicts import VerdictSpec
from aegpo.plugin.manager import load_registries, plugin_manager

ARMS = "extends: base.yaml\narms: {grpo: {}, aegpo: {selector: random}, control: {allocator: random}}\n"


@pytest.fixture(scope="module")
def registries():
    return load_registries(plugin_manager())


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yaml").write_text(BASE)
    return tmp_path


def test_without_them_every_arm_is_compared_to_the_first(folder, registries):
    verdict = load(ARMS, registries).verdict
    assert verdict == VerdictSpec()
    assert verdict.pairs(("grpo", "aegpo", "control")) == (("aegpo", "grpo"), ("control", "grpo"))


def test_a_file_names_what_is_compared_by_what_margin_and_to_what_arms_are_timed(folder, registries):
    asked = "comparisons: [[aegpo, control], [control, grpo]]\nmargin: 0.02\ntarget: 0.8\n"
    file = load(ARMS + asked, registries)
    assert file.verdict == VerdictSpec(comparisons=(("aegpo", "control"), ("control", "grpo")), margin=0.02, target=0.8)
    assert not {"comparisons", "margin", "target"} & set(file.arms["grpo"].model_dump())


def test_they_are_inherited_and_options_reach_them(folder, registries):
    (folder / "base.yaml").write_text(BASE + "margin: 0.05\ntarget: 0.7\n")
    file = load(ARMS, registries, "margin=0.1", "comparisons=[[aegpo, grpo]]")
    assert file.verdict == VerdictSpec(comparisons=(("aegpo", "grpo"),), margin=0.1, target=0.7)


@pytest.mark.parametrize(
    ("asked", "place", "message"),
    [
        (
            "comparisons: [[aegpo, contrl]]",
            "3:23: comparisons.0.1",
            "no arm is called 'contrl'; did you mean 'control'?",
        ),
        ("comparisons: [[aegpo, aegpo]]", "3:15: comparisons.0", "compares arm 'aegpo' with itself; give two arms"),
        (
            "comparisons: [[aegpo, grpo], [grpo, aegpo]]",
            "3:30: comparisons.1",
            "compares 'grpo' with 'aegpo' again; name each two arms once",
        ),
        ("comparisons: [[aegpo]]", "3:15: comparisons.0", "too few values: number 2 is missing"),
        ("comparisons: aegpo", "3:14: comparisons", "must be a list"),
        ("comparisons: []", "3:14: comparisons", "must be a list of at least 1"),
        ("margin: 0", "3:9: margin", "must be above 0, not 0"),
        ("margin: small", "3:9: margin", "must be a number"),
        ("target: high", "3:9: target", "must be a number"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(folder, registries, asked, place, message):
    told = complaint(ARMS + asked, registries)
    assert place in told
    assert message in told


def test_no_arm_may_ask_for_its_own(folder, registries):
    told = complaint("extends: base.yaml\narms: {one: {margin: 0.1}, two: {}}", registries)
    assert "arms.one: this key belongs to the file, not to an arm" in told


def test_a_file_without_arms_has_nothing_to_compare(folder, registries):
    told = complaint("extends: base.yaml\ncomparisons: [[main, grpo]]", registries)
    assert "no arm is called 'grpo'" in told


def test_editors_know_them(registries):
    fields = file_schema(registries)["properties"]
    for name in VerdictSpec.model_fields:
        assert fields[name]["description"]
    assert "margin" not in fields["arms"]["additionalProperties"]["properties"]
