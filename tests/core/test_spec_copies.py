"""Copies of specs compute anew what depends on their fields, and equal specs are equal wherever they come from."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import pytest
from worlds import GaussianSpec, small_experiment

from aegpo.config.loading import load_experiment_file, parse_experiment
from aegpo.core.experiment import Experiment
from aegpo.core.registry import Spec
from aegpo.core.sections import RolloutsSpec
from aegpo.errors import AegpoError
from aegpo.plugin.manager import load_registries, plugin_manager


class Doubled(Spec):
    """A spec with something that is computed once."""

    value: int = 1

    @cached_property
    def double(self) -> int:
        return 2 * self.value


def test_a_copy_computes_anew_what_was_computed_from_its_fields():
    spec = Doubled(value=2)
    assert spec.double == 4
    assert spec.model_copy(update={"value": 5}).double == 10
    assert spec.model_copy(deep=True).double == 4
    assert spec.double == 4


def test_an_experiment_of_other_steps_has_their_noise_levels():
    four = small_experiment(GaussianSpec(), rollouts=RolloutsSpec(denoising_steps=4))
    assert len(four.sigmas) == 5
    assert len(four.step_table.std) == 4
    seven = four.model_copy(update={"rollouts": RolloutsSpec(denoising_steps=7)})
    assert len(seven.sigmas) == 8
    assert len(seven.step_table.std) == 7
    assert np.array_equal(seven.sigmas, GaussianSpec().sigmas(7))


def test_a_copy_with_a_field_that_does_not_exist_is_refused():
    with pytest.raises(AegpoError, match="Doubled has no field 'valeu'; did you mean 'value'"):
        Doubled().model_copy(update={"valeu": 2})


def test_what_was_computed_does_not_count_when_specs_are_compared():
    one, other = small_experiment(GaussianSpec()), small_experiment(GaussianSpec())
    assert len(one.sigmas) == len(other.sigmas)
    assert one == other
    assert hash(one) == hash(other)


# --- loads of one file ------------------------------------------------------------------------------------------------


@pytest.fixture
def load(pytestconfig):
    """Loads an experiment file with registries of its own."""

    def loaded(*overrides, name="ablation"):
        path = pytestconfig.rootpath / "experiments" / f"{name}.yaml"
        return load_experiment_file(path, load_registries(plugin_manager()), overrides)

    return loaded


def nested(spec):
    """The spec and every spec in it, each with its path."""
    found = {(): spec}
    for name in type(spec).model_fields:
        value = getattr(spec, name)
        for index, each in enumerate(value if isinstance(value, tuple) else (value,)):
            if isinstance(each, Spec):
                found |= {(name, index, *path): inner for path, inner in nested(each).items()}
    return found


def test_two_loads_of_one_file_are_equal_with_every_spec_in_them_and_have_equal_hashes(load):
    one, other = load(), load()
    assert one == other
    for arm, experiment in one.arms.items():
        mine, theirs = nested(experiment), nested(other.arms[arm])
        assert ("evaluation", 0, "rewards", 1) in mine
        assert mine.keys() == theirs.keys()
        for path, spec in mine.items():
            assert spec == theirs[path]
            assert hash(spec) == hash(theirs[path])
    assert len({experiment for file in (one, other) for experiment in file.arms.values()}) == len(one.arms)


@pytest.mark.parametrize(
    "change",
    ["seed", "evaluation.images=3", "evaluation.rewards=[palette]", "rewards.0.weight=2", "optimizer.weight_decay=0"],
)
def test_experiments_of_other_content_are_not_equal(load, change):
    one = load(name="smoke").arms["grpo"]
    if change == "seed":
        assert one != load(name="smoke").experiment("grpo", 1)
        return
    other = load(change, name="smoke").arms["grpo"]
    assert one != other
    section = change.split(".")[0]
    assert getattr(one, section) != getattr(other, section)


def test_an_experiment_from_its_manifest_equals_the_one_from_its_file_and_the_plain_one(load):
    one = load().arms["aegpo"]
    again = parse_experiment(one.model_dump(mode="json"), load_registries(plugin_manager()))
    assert one == again
    plain = Experiment(**{name: getattr(one, name) for name in Experiment.model_fields})
    assert plain == one
    assert hash(plain) == hash(one)


def test_parts_of_other_kinds_are_not_equal_though_their_fields_are():
    class Tripled(Spec):
        """The same field under another name."""

        value: int = 1

    assert Doubled() != Tripled()
    assert Doubled() != 1
