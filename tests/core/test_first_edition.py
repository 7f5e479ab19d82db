"""Plugins of aegpo 0.1: each old way is answered once, by what to write instead."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import pytest
from worlds import GaussianSpec, small_experiment

from aegpo.core import first_edition, footprint, records, reports, signals, signatures
from aegpo.core.contracts import blaming
from aegpo.core.hookspecs import hookimpl
from aegpo.core.parts import AllocatorSpec, RewardSpec, SelectorSpec
from aegpo.core.records import Prompt
from aegpo.core.registry import Registry
from aegpo.errors import ContractError, ObserverError, PluginError
from aegpo.method.allocators import UniformAllocator
from aegpo.plugin.manager import load_registries, plugin_manager
from aegpo.runs.observers import Observers
from aegpo.train.engine import Engine

RECORDS = {
    name: cls
    for room in (footprint, records, reports, signals)
    for name, cls in vars(room).items()
    if isinstance(cls, type)
}
WAS = json.loads((Path(__file__).parent.parent / "data" / "records-0.1.0.json").read_text(encoding="utf-8"))


class Declares(AllocatorSpec):
    """Declares as it was."""

    kind: Literal["declares"] = "declares"
    needs_entropy: ClassVar[bool] = True


class Inherits(Declares):
    """Has it from where it comes from."""

    kind: Literal["inherits"] = "inherits"


class Offers(SelectorSpec):
    """Lets the user choose."""

    kind: Literal["offers"] = "offers"
    needs_entropy: bool = True


class Computes(SelectorSpec):
    """Says it by a property."""

    kind: Literal["computes"] = "computes"

    @property
    def needs_entropy(self) -> bool:
        """It does."""
        return True


@pytest.mark.parametrize("spec", [Declares, Inherits, Offers, Computes])
def test_a_part_that_declares_as_in_the_first_edition_is_told_the_line_to_write(spec):
    axis, base = ("allocators", AllocatorSpec) if issubclass(spec, AllocatorSpec) else ("selectors", SelectorSpec)
    registry = Registry(axis, base)
    registry.source = "aegpo-old"
    with pytest.raises(PluginError) as caught:
        registry.add(spec)
    assert str(caught.value) == (
        f"aegpo-old registers {spec.__name__!r} in {axis!r} as {spec.__name__.lower()!r}, which sets "
        "'needs_entropy', as in aegpo 0.1; write  reads: ClassVar[tuple[str, ...]] = (\"entropy\",); mend it, or leave "
        "the plugin out with AEGPO_BLOCK_PLUGINS=aegpo-old"
    )


def test_a_name_is_old_only_where_the_spec_base_has_it_no_more():
    assert first_edition.declared(Inherits, Declares) is None


def test_no_part_in_the_box_is_of_the_first_edition():
    for registry in load_registries(plugin_manager()):
        for entry in registry:
            assert first_edition.declared(entry.spec, registry.base) is None


def test_every_attribute_of_a_record_of_the_first_edition_is_there_or_answered():
    gone = {(record, name) for record, names in WAS.items() for name in names if name not in attributes(record)}
    assert gone == set(first_edition.READ)


def attributes(record: str) -> set[str]:
    cls = RECORDS[record]
    return {field.name for field in dataclasses.fields(cls)} | vars(cls).keys()


@pytest.mark.parametrize(("record", "name"), list(first_edition.READ), ids=".".join)
def test_a_part_that_reads_what_is_gone_is_told_what_to_read(record, name):
    with pytest.raises(ContractError) as caught, blaming("selector", "old"):
        getattr(object.__new__(RECORDS[record]), name)
    assert str(caught.value) == (
        f"selector 'old' failed with AttributeError: {record!r} object has no attribute {name!r}; it was written for "
        f"aegpo 0.1: use {first_edition.READ[record, name]}"
    )


def test_what_a_part_is_told_to_read_is_provided_and_can_be_read_so():
    shapes = {"prompt": (2,), "step": (3,), "prompt-step": (2, 3)}
    known = {}
    for entry in load_registries(plugin_manager()).signals:
        known |= {name: records.Signal(per, np.zeros(shapes[per])) for name, per in entry.spec.provides.items()}
    found = signals.Signals(1, 2, np.linspace(1, 0, 4), known)
    for words in (words for (record, _), words in first_edition.READ.items() if record == "Signals"):
        verb, name = re.match(r'signals\.(\w+)\("([a-z-]+)"\), declared by  reads: ', words).groups()
        assert len(getattr(found, verb)(name)) == 2


def test_other_failures_are_told_as_they_are():
    nothing = signals.Signals(1, 2, np.linspace(1, 0, 3))
    for read in (lambda: nothing.no_such_signal, lambda: {}["delta"], lambda: 1 / 0, lambda: Prompt(0, "a").lower()):
        with pytest.raises(ContractError) as caught, blaming("selector", "new"):
            read()
        assert "aegpo 0.1" not in str(caught.value)


class Asks(RewardSpec):
    """Is annotated with strings."""

    kind: Literal["asks"] = "asks"

    def score(self, images, prompts: Sequence[str]):
        return images.new_zeros(len(images))


class Refuses(RewardSpec):
    """Refuses a string."""

    kind: Literal["refuses"] = "refuses"

    def score(self, images, prompts: Sequence[Prompt]):
        return images.new_zeros(len(images))

    def refuses(self, prompt: str):
        return None


class Either(RewardSpec):
    """Takes both."""

    kind: Literal["either"] = "either"

    def score(self, images, prompts: Sequence[str | Prompt]):
        return images.new_zeros(len(images))


def test_a_reward_that_is_annotated_with_strings_is_refused_when_it_is_registered():
    assert signatures.refusal(Either, RewardSpec) is None
    assert signatures.refusal(Asks, RewardSpec).startswith(
        "has score(images, prompts: Sequence[str]), as in aegpo 0.1; asked is  score(images: Tensor, prompts: "
        "Sequence[Prompt]) -> Tensor  now: use prompt.text"
    )
    assert signatures.refusal(Refuses, RewardSpec) == (
        "has refuses(prompt: str), as in aegpo 0.1; asked is  refuses(prompt: Prompt) -> str | None  now: use "
        "prompt.text"
    )


def test_a_verb_that_had_another_name_is_said_with_it():
    class Model:
        def base(self):
            return None

    assert first_edition.renamed(Model(), "frozen") == "; it was 'base' in aegpo 0.1"
    assert first_edition.renamed(object(), "frozen") == ""
    assert first_edition.renamed(Model(), "velocity") == ""


class Watcher:
    """Expects evaluations in reports."""

    @hookimpl
    def aegpo_on_step_end(self, report):
        return report.evaluation


def test_an_observer_of_the_first_edition_is_told_of_the_hook_for_evaluations(tmp_path):
    run = reports.RunInfo("main", 0, tmp_path, first_step=0, training_steps=1)
    observers = Observers(plugin_manager(), run, print)
    observers.add("tracker 'watcher'", Watcher())
    report = reports.StepReport(1, {}, (), np.zeros(0, np.int64), np.zeros((0, 4), np.bool_), {}, {})
    with pytest.raises(ObserverError) as caught:
        observers.stepped(report)
    assert str(caught.value) == (
        "tracker 'watcher' failed with AttributeError: 'StepReport' object has no attribute 'evaluation'; it was "
        "written for aegpo 0.1: use the hook aegpo_on_evaluation(run, step, evaluation), which is told of step 0, "
        "before training, too; aegpo_on_step_end begins with step 1 (in aegpo_on_step_end)"
    )


class Peeking(UniformAllocator):
    """Reads a field that is gone."""

    kind: Literal["peeking"] = "peeking"  # type: ignore[assignment]

    def allocate(self, signals, budget, rng):
        return np.argsort(signals.delta)


def test_the_engine_and_check_pass_the_advice_on():
    engine = Engine.build(small_experiment(GaussianSpec(), allocator=Peeking()))
    with pytest.raises(
        ContractError, match=r"it was written for aegpo 0.1: use signals.by_prompt\(\"entropy-delta\"\)"
    ):
        engine.step(1)
