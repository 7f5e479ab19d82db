"""Experiment files: what they resolve to, and the text of every mistake."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Literal

import numpy as np
import pluggy
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, model_validator
from repository import ROOT, shipped

from aegpo.config.loading import load_experiment_file, parse_experiment
from aegpo.config.marks import merge
from aegpo.config.parsing import parse
from aegpo.core import hookspecs
from aegpo.core.parts import AllocatorSpec
from aegpo.errors import SpecError
from aegpo.plugin import built_in
from aegpo.plugin.manager import load_registries

BASE = """\
model: shapes
rewards: [palette]
allocator: uniform
selector: uniform
tree: independent
sampler: flow-sde
advantage: group
objective: clipped
"""


@pytest.fixture(scope="module")
def registries():
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    manager.register(built_in, "aegpo")
    return load_registries(manager)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("base.yaml").write_text(BASE)
    return tmp_path


def load(text: str, registries, *overrides: str):
    Path("x.yaml").write_text(textwrap.dedent(text))
    return load_experiment_file(Path("x.yaml"), registries, overrides)


def complaint(text: str, registries, *overrides: str) -> str:
    with pytest.raises(SpecError) as caught:
        load(text, registries, *overrides)
    return str(caught.value)


# --- what files resolve to -------------------------------------------------------------------------------------------


def test_a_file_without_arms_and_seeds_is_one_arm_under_seed_0(folder, registries):
    file = load(BASE, registries)
    assert list(file.arms) == ["main"]
    assert file.seeds == (0,)
    assert file.arms["main"].allocator.kind == "uniform"


def test_a_bare_name_is_short_for_its_kind(folder, registries):
    short = load(BASE, registries).arms["main"]
    long = load(BASE.replace("allocator: uniform", "allocator: {kind: uniform}"), registries).arms["main"]
    assert short.model_dump() == long.model_dump()


def test_arms_patch_the_base_and_mappings_merge(folder, registries):
    file = load(
        """
        extends: base.yaml
        seeds: [3, 5]
        optimizer: {learning_rate: 1e-3, weight_decay: 0}
        arms:
          plain: {}
          slow:
            optimizer: {learning_rate: 1e-4}
        """,
        registries,
    )
    assert file.arms["plain"].optimizer.learning_rate == 1e-3
    assert file.arms["slow"].optimizer.learning_rate == 1e-4
    assert file.arms["slow"].optimizer.weight_decay == 0
    assert [experiment.seed for experiment in file.arms.values()] == [3, 3]
    assert file.experiment("slow", 5).seed == 5
    assert file.experiment("slow", 5).model_copy(update={"seed": 3}) == file.arms["slow"]


def test_files_extend_one_another_to_any_depth_and_paths_stay_relative_to_the_file_that_has_them(folder, registries):
    deep = folder / "deep"
    deep.mkdir()
    (deep / "mine.txt").write_text("".join(f"{count} red circles\n" for count in ["two", "three"] * 4))
    (deep / "first.yaml").write_text("extends: ../base.yaml\ntraining_steps: 3\nprompts: {train: mine.txt}\n")
    for number in range(40):
        below = f"step-{number - 1}.yaml" if number else "deep/first.yaml"
        Path(f"step-{number}.yaml").write_text(f"extends: {below}\ncheckpoint: {{keep: {number + 1}}}\n")
    arm = load("extends: step-39.yaml\nallocator: random\n", registries).arms["main"]
    assert (arm.training_steps, arm.checkpoint.keep, arm.allocator.kind) == (3, 40, "random")
    assert arm.prompts.train == deep / "mine.txt"


def test_a_file_drops_arms_that_it_inherits_and_may_define_them_anew(folder, registries):
    Path("first.yaml").write_text(
        "extends: base.yaml\narms: {grpo: {}, old: {training_steps: 5}, aegpo: {allocator: entropy}}\n"
    )
    file = load("extends: first.yaml\narms: {old: null, new: {training_steps: 7}}\n", registries)
    assert list(file.arms) == ["grpo", "aegpo", "new"]
    file = load("extends: first.yaml\n", registries, "arms.old=null", "arms.grpo=null")
    assert list(file.arms) == ["aegpo"]
    Path("second.yaml").write_text("extends: first.yaml\narms: {old: null}\ncomparisons: [[aegpo, grpo]]\n")
    file = load("extends: second.yaml\narms: {old: {}}\ncomparisons: [[aegpo, old]]\n", registries)
    assert list(file.arms) == ["grpo", "aegpo", "old"]
    assert file.arms["old"].training_steps == file.arms["grpo"].training_steps


@pytest.mark.parametrize(
    ("patch", "low", "high"),
    [
        ("{low: 4}", 4, 20),
        ("{kind: entropy, low: 4}", 4, 20),
        ("{kind: random, low: 4, high: 16}", 4, 16),
        ("{kind: random}", 8, 16),
        ("entropy", 8, 16),
    ],
)
def test_a_patch_that_names_another_kind_replaces_the_part_and_any_other_merges(folder, registries, patch, low, high):
    rollouts = f"rollouts: {{prompts_per_step: 2, rollouts_per_step: {low + high}}}"
    arm = load(
        f"""
        extends: base.yaml
        allocator: {{kind: entropy, high: 20}}
        {rollouts}
        arms: {{one: {{allocator: {patch}}}}}
        """,
        registries,
    ).arms["one"]
    assert (arm.allocator.low, arm.allocator.high) == (low, high)


def test_options_merge_into_a_part_that_was_given_by_its_bare_name(folder, registries):
    arm = load(BASE.replace("selector: uniform", "selector: random"), registries, "selector.top_k=2").arms["main"]
    assert (arm.selector.kind, arm.selector.top_k) == ("random", 2)


def test_lists_replace(folder, registries):
    text = "extends: base.yaml\nrewards: [palette, scene]\narms: {one: {rewards: [scene]}}"
    assert [reward.kind for reward in load(text, registries).arms["one"].rewards] == ["scene"]


def test_an_option_wins_over_arms(folder, registries):
    text = "extends: base.yaml\narms: {one: {training_steps: 7}, two: {}}"
    file = load(text, registries, "training_steps=3", "seeds=[4]")
    assert [experiment.training_steps for experiment in file.arms.values()] == [3, 3]
    assert file.seeds == (4,)


def test_an_option_reaches_into_lists_and_arms(folder, registries):
    text = "extends: base.yaml\nrewards: [palette, scene]\narms: {one: {}, two: {}}"
    file = load(text, registries, "rewards.1.weight=0.5", "arms.two.training_steps=3")
    assert [reward.weight for reward in file.arms["one"].rewards] == [1.0, 0.5]
    assert [experiment.training_steps for experiment in file.arms.values()] == [40, 3]


NUMBERS = {"1e-4": 1e-4, "1E3": 1000.0, ".5": 0.5, "5.": 5.0, "-3": -3, "010": 10}
WORDS = {"no": "no", "on": "on", "yes": "yes", "true": True, "False": False, "~": None, "": None}
TEXTS = {"'1'": "1", "1_000": "1_000", "2026-01-01": "2026-01-01", "12:30": "12:30", "0x10": "0x10"}


@pytest.mark.parametrize(("text", "value"), (NUMBERS | WORDS | TEXTS).items())
def test_scalars_are_read_as_yaml_1_2_has_them(text, value):
    document, mistakes = parse(f"key: {text}", "x.yaml")
    assert not mistakes
    assert document.plain == {"key": value}
    assert type(document.plain["key"]) is type(value)


def test_every_value_knows_where_it_stands():
    document, _ = parse("a:\n  - b: 1\n    'c': [x,\n        y]\n", "x.yaml")
    assert str(document.find(("a", 0, "c", 1))[0].mark) == "x.yaml:4:9"
    assert str(document.find(("a", 0, "c"))[0].key) == "x.yaml:3:5"


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | st.text("abc", min_size=1),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abcd"), inner, max_size=3),
    max_leaves=8,
)
mappings = st.dictionaries(st.sampled_from("abcd"), plain, max_size=3)


def marked(data):
    return parse(json.dumps(data), "x.yaml")[0]


@given(mappings)
def test_a_patch_of_nothing_and_a_patch_of_itself_change_nothing(data):
    assert merge(marked(data), marked({})).plain == data
    assert merge(marked(data), marked(data)).plain == data


@given(mappings, mappings)
def test_every_value_of_a_patch_is_found_in_the_result(base, patch):
    def agrees(merged, wanted) -> bool:
        if isinstance(wanted, dict):
            return isinstance(merged, dict) and all(agrees(merged.get(key), value) for key, value in wanted.items())
        return merged == wanted

    assert agrees(merge(marked(base), marked(patch)).plain, patch)


# --- manifests -------------------------------------------------------------------------------------------------------


def test_manifest_to_experiment_to_manifest_is_the_identity(folder, registries):
    for path in shipped(ROOT / "experiments", "*.yaml"):
        for experiment in load_experiment_file(path, registries).arms.values():
            manifest = experiment.model_dump(mode="json")
            assert type(experiment).model_validate(manifest) == experiment
            assert parse_experiment(manifest, registries).model_dump() == experiment.model_dump()
            assert parse_experiment(manifest, registries).model_dump(mode="json") == manifest


def test_a_manifest_that_no_longer_fits_names_each_key(folder, registries):
    manifest = load(BASE, registries).arms["main"].model_dump(mode="json")
    manifest["sampler"] = {"kind": "gone"}
    manifest["precision"] = "float8"
    with pytest.raises(SpecError) as caught:
        parse_experiment(manifest, registries)
    assert str(caught.value) == (
        "precision: must be 'float32', 'bfloat16' or 'float16', not 'float8'; did you mean 'float32'?\n"
        "sampler: unknown kind 'gone'; known: cps, dance-sde, ddim, flow-sde"
    )


# --- mistakes --------------------------------------------------------------------------------------------------------

GOLDEN = Path(__file__).parents[1] / "data" / "mistakes.txt"


def golden_cases() -> list[tuple[str, list[str], str, str]]:
    """(title, options, file, message) of each case in data/mistakes.txt."""
    cases = []
    for case in GOLDEN.read_text().split("=== ")[1:]:
        title, _, rest = case.partition("\n")
        given_text, _, message = rest.partition("--- says\n")
        lines = given_text.splitlines()
        options = [line.removeprefix("--set ") for line in lines if line.startswith("--set ")]
        file = "\n".join(line for line in lines if not line.startswith("--set "))
        cases.append((title, options, file, message.strip("\n")))
    return cases


@pytest.mark.parametrize(
    ("options", "text", "message"),
    [pytest.param(*case[1:], id=case[0]) for case in golden_cases()],
)
def test_a_mistake_says_where_what_and_what_would_be_right(folder, registries, options, text, message):
    others = {
        "second.yaml": "extends: third.yaml",
        "third.yaml": "extends: x.yaml",
        "arms.yaml": "extends: base.yaml\narms: {grpo: {}, aegpo: {allocator: entropy}}",
        "pairs.yaml": "extends: arms.yaml\ncomparisons: [[aegpo, grpo]]",
        "broken.yaml": "extends: base.yaml\ntrainig_steps: 3",
    }
    for name, content in others.items():
        Path(name).write_text(f"{content}\n")
    assert complaint(text, registries, *options) == message


def test_a_file_that_is_not_there_is_named(folder, registries):
    with pytest.raises(SpecError, match=r"^nope.yaml: cannot be read: No such file or directory; give the path"):
        load_experiment_file(Path("nope.yaml"), registries)


def test_a_file_that_is_not_text_is_named(folder, registries):
    Path("x.yaml").write_bytes(b"name: \xff\xfe")
    with pytest.raises(SpecError, match=r"^x.yaml:1:7: not UTF-8 text \(byte 0xff\); save it as UTF-8"):
        load_experiment_file(Path("x.yaml"), registries)


def test_a_control_character_is_a_mistake_and_no_traceback(folder, registries):
    assert complaint("name: a\x00b\n", registries).splitlines()[0] == (
        "x.yaml:1:8: a byte 0, which text does not have; if this is text, in UTF-16 perhaps, save it as UTF-8"
    )


class Choosy(AllocatorSpec):
    """An allocator with constraints of its own."""

    kind: Literal["choosy"] = "choosy"
    share: float | Literal["auto"] = Field("auto", description="a number or auto")
    ends: tuple[int, ...] = Field((), description="whole numbers")

    @model_validator(mode="after")
    def _ascending(self):
        if list(self.ends) != sorted(self.ends):
            raise ValueError(f"'ends' must ascend, not {self.ends}")
        return self

    def allocate(self, signals, budget, rng):
        return np.full(signals.num_prompts, budget // signals.num_prompts)

    def problems(self, experiment):
        if experiment.rollouts.prompts_per_step == 8:
            yield "8 prompts are too many; at most 7"


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (
            "{kind: choosy, share: [x]}",
            "x.yaml:9:34: allocator.share: must be a number or 'auto', not a list of 1\n"
            "  allocator: {kind: choosy, share: [x]}\n                                   ^",
        ),
        (
            "{kind: choosy, ends: ['1', 2]}",
            "x.yaml:9:34: allocator.ends.0: must be a whole number, not '1'\n"
            "  allocator: {kind: choosy, ends: ['1', 2]}\n                                   ^",
        ),
        (
            "{kind: choosy, ends: [2, 1]}",
            "x.yaml:9:12: allocator: 'ends' must ascend, not (2, 1)\n"
            "  allocator: {kind: choosy, ends: [2, 1]}\n             ^",
        ),
        (
            "choosy",
            "x.yaml:9:12: allocator: 8 prompts are too many; at most 7\n  allocator: choosy\n             ^",
        ),
    ],
)
def test_constraints_of_a_plugins_spec_are_reported_alike(folder, part, message):
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    manager.register(built_in, "aegpo")
    registries = load_registries(manager)
    registries.allocators.add(Choosy)
    text = BASE.replace("allocator: uniform\n", "") + f"\nallocator: {part}"
    assert complaint(text, registries) == message


def test_an_arm_may_not_have_a_name_the_report_keeps(folder, registries):
    text = BASE + "arms:\n  report: {}\n"
    assert "arms.report: the report keeps 'report' beside the arms; choose another name" in complaint(text, registries)


def test_a_combination_that_an_arm_makes_impossible_is_reported_where_the_arm_changes_the_part(folder, registries):
    base = BASE.replace("sampler: flow-sde", "sampler: {kind: flow-sde, noise_level: 0.7}")
    text = base + "arms:\n  plain: {}\n  still: {sampler: {noise_level: 0}}\n"
    said = complaint(text, registries)
    line = text.splitlines().index("  still: {sampler: {noise_level: 0}}") + 1
    assert f"x.yaml:{line}:" in said
    assert "'noise_level' 0 makes every step deterministic" in said
    assert "(in arm 'still')" in said
