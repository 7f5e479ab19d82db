"""Specs: what is in the box validates, round-trips, documents itself, and says what is wrong in plain words."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal, get_args, get_origin

import numpy as np
import pytest
from annotated_types import Ge, Gt, Le, Lt
from pydantic import ValidationError
from worlds import BrightnessReward, GaussianSpec, small_experiment

import aegpo
from aegpo.core.experiment import EvaluationSpec, Experiment
from aegpo.core.experiment_type import experiment_type
from aegpo.core.parts import AllocatorSpec, ModelSpec, ObjectiveSpec, RewardSpec, SelectorSpec, TrackerSpec
from aegpo.core.registries import PART_AXES
from aegpo.core.sections import (
    CheckpointSpec,
    OptimizerSpec,
    PolicySpec,
    PromptsSpec,
    RolloutsSpec,
    ScheduleSpec,
    TailSpec,
)
from aegpo.method.allocators import EntropyAllocator, RandomAllocator, UniformAllocator
from aegpo.method.objectives import ClippedObjective
from aegpo.method.selectors import EntropyPeakSelector, RandomSelector
from aegpo.method.signals import EntropySignal
from aegpo.method.trees import BranchingTree
from aegpo.models.shapes import ShapesSpec
from aegpo.plugin.manager import load_registries, plugin_manager
from aegpo.rewards.palette import PaletteReward
from aegpo.runs.trackers import ConsoleTracker, JsonlTracker

SECTIONS = (PromptsSpec, RolloutsSpec, PolicySpec, OptimizerSpec, ScheduleSpec, EvaluationSpec)
SECTIONS += (CheckpointSpec, Experiment)
MINIMAL = {
    "model": "shapes",
    "rewards": ["palette"],
    "allocator": "uniform",
    "selector": "uniform",
    "tree": "independent",
    "sampler": "flow-sde",
    "advantage": "group",
    "objective": "clipped",
}


@pytest.fixture(scope="module")
def registries():
    return load_registries(plugin_manager())


@pytest.fixture(scope="module")
def narrowed(registries):
    """The type files are validated against."""
    return experiment_type(registries)


def builtin_specs():
    registries = load_registries(plugin_manager())
    return [entry.spec for registry in registries for entry in registry if entry.source == "aegpo"]


def bounded(annotation: object, metadata: Sequence[object]) -> bool:
    """Whether numbers of a field, or items of its lists, have a least and a greatest value; what has none needs none.

    Items without bounds of their own are denoising steps, which their part compares with the trajectory.
    """
    if annotation not in (int, float):
        found = [part for part in get_args(annotation) if part is not Ellipsis]
        inner = [
            (get_args(part)[0], getattr(get_args(part)[1], "metadata", ()))
            for part in found
            if get_origin(part) is Annotated
        ]
        plain = [(part, metadata) for part in found if get_origin(part) is not Annotated]
        if get_origin(annotation) is tuple and found[0] is int:
            return True
        return get_origin(annotation) is Literal or all(bounded(*each) for each in (*inner, *plain))
    low = any(isinstance(each, Ge | Gt) for each in metadata)
    return low and any(isinstance(each, Le | Lt) for each in metadata)


@pytest.mark.parametrize("spec", [*builtin_specs(), *SECTIONS, TailSpec], ids=lambda spec: spec.__name__)
def test_every_number_has_bounds(spec):
    fields = spec.model_fields.items()
    assert [name for name, field in fields if not bounded(field.annotation, field.metadata)] == []


@pytest.mark.parametrize("seed", [-1, 2**63, 10**30])
@pytest.mark.parametrize("spec", [EvaluationSpec, PromptsSpec, EntropySignal])
def test_a_seed_is_from_0_to_what_64_bits_hold(spec, seed):
    with pytest.raises(ValidationError, match="seed"):
        spec(seed=seed)
    assert spec(seed=2**63 - 1).seed == 2**63 - 1


def test_the_box_holds_what_it_promises(registries):
    box = {registry.axis: set(registry.names) for registry in registries}
    assert box.keys() == PART_AXES.keys()
    promised = {
        "models": {"shapes"},
        "rewards": {"scene", "palette"},
        "allocators": {"uniform", "random", "entropy"},
        "selectors": {"uniform", "random", "entropy-peak"},
        "trees": {"independent", "branching"},
        "samplers": {"flow-sde"},
        "advantages": {"group", "depth"},
        "objectives": {"clipped", "guarded", "divergence-masked", "nft", "awm", "dgpo"},
        "trackers": {"console", "jsonl", "tensorboard", "accelerate"},
    }
    for axis, names in promised.items():
        assert names <= box[axis]


def test_specs_are_validated_without_importing_torch():
    code = (
        "import sys\n"
        "from aegpo.plugin.manager import load_registries, plugin_manager\n"
        "from aegpo.core.experiment_type import experiment_type\n"
        f"experiment = experiment_type(load_registries(plugin_manager())).model_validate({MINIMAL!r})\n"
        "assert all(problem.warning for problem in experiment.problems())\n"
        "assert len(experiment.sigmas) == 11\n"
        "sys.exit('torch' in sys.modules)"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr


@pytest.mark.parametrize("spec", builtin_specs(), ids=lambda spec: spec.__name__)
def test_every_field_of_a_part_documents_itself(spec):
    undocumented = [name for name, field in spec.model_fields.items() if name != "kind" and not field.description]
    assert undocumented == []


@pytest.mark.parametrize("spec", builtin_specs(), ids=lambda spec: spec.__name__)
def test_a_part_needs_nothing_but_its_name_unless_only_the_user_knows_it(spec):
    kind = spec.model_fields["kind"].default
    judges = {"vlm-judge": {"url", "model"}, "vlm-preference": {"url", "model"}}
    others = {"remote": {"url"}, "median-split": {"signal"}, "peaks": {"signal"}, "accelerate": {"log_with"}}
    asked = {**others, **judges}.get(kind, set())
    assert {name for name, field in spec.model_fields.items() if field.is_required()} == asked
    if not asked:
        assert spec.model_validate({"kind": kind}) == spec()
        assert spec().kind == kind


def test_every_option_of_a_section_documents_itself():
    parts = {
        "model",
        "rewards",
        "curriculum",
        "allocator",
        "selector",
        "tree",
        "sampler",
        "advantage",
        "objective",
        "trackers",
    }
    sections = {"prompts", "rollouts", "policy", "optimizer", "parallel", "evaluation", "checkpoint"}
    undocumented = [
        f"{section.__name__}.{name}"
        for section in SECTIONS
        for name, field in section.model_fields.items()
        if not field.description and not (section is Experiment and name in parts | sections)
    ]
    assert undocumented == []


def test_a_bare_name_is_short_for_a_part_with_defaults(narrowed):
    experiment = narrowed.model_validate(MINIMAL)
    spelt_out = {name: {"kind": value} if isinstance(value, str) else value for name, value in MINIMAL.items()}
    assert experiment == narrowed.model_validate(spelt_out | {"rewards": [{"kind": "palette"}]})
    assert experiment.allocator == UniformAllocator()
    assert experiment.rewards == (PaletteReward(),)
    assert [problem for problem in experiment.problems() if not problem.warning] == []


def test_a_dumped_experiment_validates_to_itself(narrowed):
    values = MINIMAL | {
        "seed": 3,
        "rewards": [{"kind": "palette", "weight": 0.5}, {"kind": "scene", "name": "strict"}],
        "allocator": {"kind": "entropy", "low": 4, "high": 8, "warmup": 2},
        "selector": {"kind": "entropy-peak", "top_k": 2, "min_gap": 2},
        "tree": {"kind": "branching", "factor": 3},
        "policy": {"train": "lora", "ema": 0.9},
        "evaluation": {"rewards": ["scene"]},
        "prompts": {"train": "prompts.txt"},
        "trackers": ["console", "jsonl"],
    }
    experiment = narrowed.model_validate(values)
    assert narrowed.model_validate(experiment.model_dump()) == experiment
    assert narrowed.model_validate_json(experiment.model_dump_json()) == experiment
    dumped = experiment.model_dump()
    assert dumped["allocator"] == {"kind": "entropy", "low": 4, "high": 8, "warmup": 2}
    assert dumped["evaluation"]["rewards"][0]["kind"] == "scene"


def test_specs_are_frozen():
    experiment = small_experiment(GaussianSpec())
    with pytest.raises(ValidationError, match="frozen"):
        experiment.seed = 3
    with pytest.raises(ValidationError, match="frozen"):
        experiment.allocator.kind = "other"


@pytest.mark.parametrize(
    "values",
    [
        {"unknown": 1},
        {"allocator": {"kind": "uniform", "low": 8}},
        {"allocator": "unheard-of"},
        {"rewards": []},
        {"seed": -1},
        {"name": "no spaces"},
        {"device": "tpu"},
        {"rollouts": {"denoising_steps": 1}},
        {"rollouts": {"storage": "float64"}},
        {"optimizer": {"learning_rate": 0}},
        {"policy": {"ema": 1.0}},
        {"allocator": {"kind": "entropy", "low": -1}},
        {"tree": {"kind": "branching", "factor": 1}},
        {"selector": {"kind": "random", "top_k": 0}},
        {"evaluation": {"denoising_steps": 1}},
    ],
    ids=str,
)
def test_values_that_make_no_sense_are_refused(narrowed, values):
    with pytest.raises(ValidationError):
        narrowed.model_validate(MINIMAL | values)


def problems(**changes) -> list[tuple[tuple[str | int, ...], str]]:
    experiment = small_experiment(changes.pop("model", GaussianSpec()), **changes)
    return [(problem.location, problem.message) for problem in experiment.problems()]


def test_groups_too_small_to_compare_are_refused():
    rollouts = RolloutsSpec(prompts_per_step=4, rollouts_per_step=4, denoising_steps=4)
    place = ("rollouts", "rollouts_per_step")
    assert problems(rollouts=rollouts) == [
        (place, "a group needs 2 rollouts to be compared: 4 prompts need at least 8")
    ]


@pytest.mark.parametrize(
    ("chunk", "nearest"), [(5, "4 and 6"), (7, "6 and 8"), (9, "8 and 12"), (25, "24"), (11, "8 and 12")]
)
def test_updates_that_do_not_divide_a_step_are_refused_with_the_nearest_that_do(chunk, nearest):
    rollouts = RolloutsSpec(prompts_per_step=2, rollouts_per_step=24, denoising_steps=4)
    found = problems(rollouts=rollouts, optimizer=OptimizerSpec(rollouts_per_update=chunk))
    place = ("optimizer", "rollouts_per_update")
    message = f"{chunk} does not divide the step's 24 rollouts; nearest that do: {nearest}"
    assert found == [(place, message)]


class WordlessSpec(GaussianSpec):
    """A model without captions of its own."""

    kind: Literal["wordless"] = "wordless"
    has_captions: ClassVar[bool] = False


def test_a_model_without_captions_needs_files(tmp_path):
    message = "model 'wordless' brings no captions: name a file as {!r}"
    train, evaluation = (("prompts",), message.format("train")), (("prompts",), message.format("evaluation"))
    file = tmp_path / "prompts.txt"
    assert problems(model=WordlessSpec()) == [train, evaluation]
    assert problems(model=WordlessSpec(), prompts=PromptsSpec(train=file)) == [evaluation]
    assert problems(model=WordlessSpec(), prompts=PromptsSpec(train=file, evaluation=file)) == []


def test_rewards_that_share_a_label_are_refused_where_they_stand():
    twice = (BrightnessReward(), BrightnessReward(name="other"), BrightnessReward())
    message = "two rewards are called 'brightness'; give one a 'name' of its own"
    assert problems(rewards=twice) == [(("rewards", 2), message)]
    guard = EvaluationSpec(rewards=(BrightnessReward(name="guard"), BrightnessReward()))
    assert problems(evaluation=guard) == [(("evaluation", "rewards", 1), message)]
    assert problems(evaluation=EvaluationSpec(rewards=(BrightnessReward(name="guard"),))) == []


def test_a_tracker_that_is_named_twice_is_refused_where_it_stands():
    twice = small_experiment(GaussianSpec(), trackers=(ConsoleTracker(), JsonlTracker(), ConsoleTracker()))
    (problem,) = twice.problems()
    assert problem.location == ("trackers", 2)
    assert problem.message == "two trackers are 'console' with the same settings; name it once"


def test_all_problems_are_found_at_once():
    found = problems(
        rollouts=RolloutsSpec(prompts_per_step=3, rollouts_per_step=5, denoising_steps=4),
        allocator=RandomAllocator(),
        selector=RandomSelector(top_k=9),
        optimizer=OptimizerSpec(rollouts_per_update=2),
        rewards=(BrightnessReward(), BrightnessReward()),
    )
    assert [location for location, _ in found] == [
        ("rollouts", "rollouts_per_step"),
        ("optimizer", "rollouts_per_update"),
        ("rewards", 1),
        ("allocator",),
        ("selector",),
    ]


def test_rollouts_of_an_older_policy_cannot_take_over_the_probes_evaluations():
    class Lagging(ClippedObjective):
        """Samples by an older policy."""

        keeps_old: ClassVar[bool] = True

    parts = {"selector": EntropyPeakSelector(top_k=2), "objective": Lagging()}
    assert not [found for found in small_experiment(GaussianSpec(), **parts).problems() if not found.warning]
    wrong = small_experiment(GaussianSpec(), signals={"entropy": EntropySignal(source="rollout")}, **parts)
    (problem,) = (found for found in wrong.problems() if not found.warning)
    assert problem.location == ("signals", "entropy", "source")
    assert problem.message == (
        "objective 'clipped' samples rollouts by an older policy than the one that is probed, so they cannot take over "
        "its evaluations; use 'probe'"
    )


def test_the_probe_runs_only_if_a_chosen_part_asks():
    plain = small_experiment(GaussianSpec(), tree=BranchingTree())
    assert not plain.sources
    for parts in ({"allocator": EntropyAllocator()}, {"selector": EntropyPeakSelector()}):
        assert list(small_experiment(GaussianSpec(), **parts).sources) == ["entropy"]
    assert not small_experiment(GaussianSpec(), allocator=RandomAllocator(), selector=RandomSelector()).sources


def test_the_noise_levels_of_the_spec_are_those_of_the_loaded_model(tiny_spec, tiny_model):
    for steps in (2, 10, 28):
        np.testing.assert_array_equal(tiny_model.sigmas(steps).numpy(), tiny_spec.sigmas(steps).astype(np.float32))
    assert small_experiment(tiny_spec).sigmas.tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_a_reward_is_labelled_by_its_name_or_its_kind():
    assert BrightnessReward().label == "brightness"
    assert BrightnessReward(name="light").label == "light"


def test_specs_that_forget_to_build_say_so():
    class Empty(ModelSpec):
        kind: Literal["empty"] = "empty"

    class Mute(Empty):
        def build(self, device):
            return None

        def sigmas(self, steps):
            return None

    class Silent(TrackerSpec):
        kind: Literal["silent"] = "silent"

    with pytest.raises(TypeError, match="abstract class Empty with abstract methods build, sigmas"):
        Empty()
    with pytest.raises(TypeError, match="abstract class Silent with abstract method build"):
        Silent()
    with pytest.raises(NotImplementedError, match="model 'empty' does not define captions\\(split, count, seed\\)"):
        Mute().captions("train", 1, 0)


def test_a_spec_with_nothing_to_load_is_its_own_part():
    for spec in (UniformAllocator(), RandomSelector(), BranchingTree()):
        assert spec.build() is spec
    assert BrightnessReward().build(None) is not None
    assert AllocatorSpec(kind="any").reads == SelectorSpec(kind="any").reads == ()
    assert not ObjectiveSpec(kind="any").needs_base
    assert RewardSpec(kind="any").label == "any"


def test_the_public_names_exist():
    assert all(hasattr(aegpo, name) for name in aegpo.__all__)
    assert aegpo.ModelSpec is ModelSpec
    assert ShapesSpec().kind == "shapes"


@pytest.mark.parametrize("name", ["two\nlines", "\x1b[2J", "\u202eegral"])
def test_a_label_that_no_table_can_show_is_refused(name):
    with pytest.raises(ValidationError, match="a label has printable ones alone"):
        BrightnessReward(name=name)
    assert BrightnessReward(name="Fär 💥").label == "Fär 💥"
