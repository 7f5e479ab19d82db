"""Sources of signals: from outside, for nobody, and those that break what they promise."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
import torch
from command_line import aegpo as command
from repository import ROOT
from settling import Settling, SettlingSignal
from worlds import SOURCES, BrightnessReward, GaussianSpec, small_experiment

from aegpo.core.declared import check_declared
from aegpo.core.experiment_type import experiment_type
from aegpo.core.parts import SignalSpec
from aegpo.core.records import Per
from aegpo.core.sections import PromptsSpec, RolloutsSpec
from aegpo.core.signals import Measurement
from aegpo.errors import ContractError, PluginError
from aegpo.method.allocators import KnapsackAllocator, MedianSplitAllocator, RewardStdAllocator
from aegpo.method.costs import cost
from aegpo.method.selectors import PeaksSelector
from aegpo.method.signals import EntropySignal, RewardSignal, StepNoiseSignal
from aegpo.plugin.manager import load_registries, plugin_manager
from aegpo.prompts.curricula import BoundaryCurriculum, Shuffle, ShuffleCurriculum
from aegpo.testing import check_allocator, check_curriculum, check_signal
from aegpo.train.engine import Engine

ROLLOUTS = RolloutsSpec(prompts_per_step=2, rollouts_per_step=12, denoising_steps=4)
BY_SETTLING = {
    "rollouts": ROLLOUTS,
    "allocator": MedianSplitAllocator(signal="restlessness", low=4, high=8, warmup=0),
    "selector": PeaksSelector(signal="change", top_k=2),
    "signals": {**SOURCES, "settling": SettlingSignal(seed=3)},
}


def test_a_signal_from_outside_drives_allocator_and_selector():
    engine = Engine.build(small_experiment(GaussianSpec(), **BY_SETTLING))
    report = engine.step(1)
    change, restless = (report.signals[name].values for name in ("change", "restlessness"))
    assert np.array_equal(report.counts, np.where(restless > np.median(restless), 8, 4))
    best = np.sort(np.argsort(-change[:, :3], axis=1, kind="stable")[:, :2], axis=1)
    assert [np.flatnonzero(row).tolist() for row in report.selected] == best.tolist()
    assert report.metrics["signal_forwards"] == 2 * 4
    with torch.no_grad():
        measured = Settling(3).measure(1, engine.asked(1), engine.policy).values
    assert engine.step(2).metrics["signal_forwards"] == 2 * 4
    assert measured["change"].shape == (2, 4)


def test_its_cost_is_part_of_check():
    plain = small_experiment(GaussianSpec(), rollouts=ROLLOUTS)
    assert cost(plain).signals == 0
    spent = cost(small_experiment(GaussianSpec(), **BY_SETTLING))
    assert (spent.signals, spent.signals_base) == (2 * 4, 0)


def test_a_run_by_a_signal_from_outside_is_recorded_and_reported(tmp_path):
    path = tmp_path / "settling.yaml"
    path.write_text(
        "name: settling\nmodel: shapes\nrewards: [palette]\ntraining_steps: 2\ntrackers: [jsonl]\n"
        "prompts: {train_count: 8, evaluation_count: 4}\n"
        "rollouts: {prompts_per_step: 2, rollouts_per_step: 12, denoising_steps: 5}\n"
        "allocator: {kind: median-split, signal: restlessness, low: 4, high: 8}\n"
        "selector: {kind: peaks, signal: change, top_k: 2}\ntree: branching\nevaluation: {images: 2}\n"
    )
    plugin = str(ROOT / "tests" / "settling.py")
    shown = command("check", str(path), "--plugin", plugin)
    assert shown.code == 0, shown.stderr
    assert " 10 + 0 once " in shown.stdout
    done = command("run", str(path), "--plugin", plugin, "--out", str(tmp_path))
    assert done.code == 0, done.stderr
    rows = [json.loads(line) for line in next(tmp_path.rglob("metrics.jsonl")).read_text().splitlines()]
    assert [np.shape(row["signals"]["change"]) for row in rows] == [(2, 5)] * 2
    assert (tmp_path / "settling" / "report.html").exists()


# --- who is measured -------------------------------------------------------------------------------------------------


def test_only_sources_that_somebody_reads_are_built_and_they_stand_in_the_manifest():
    names = experiment_type(load_registries(plugin_manager()))
    fields = {"model": {"kind": "shapes"}, "rewards": [{"kind": "palette"}]}
    quiet = names.model_validate(fields)
    assert quiet.signals == {}
    peaks = names.model_validate({**fields, "selector": "entropy-peak", "signals": {"entropy": {"rows": 9}}})
    assert peaks.model_dump()["signals"]["entropy"]["rows"] == 9
    split = names.model_validate({**fields, "allocator": {"kind": "median-split", "signal": "reward-std"}})
    assert split.model_dump()["signals"] == {"reward-statistics": {"kind": "reward-statistics"}}
    assert peaks.model_copy(update={"allocator": KnapsackAllocator()}).sources.keys() == {
        "entropy",
        "reward-statistics",
    }


def test_what_prompts_brought_is_told_to_the_sources_that_learn_from_it():
    prompts = PromptsSpec(train_count=2, evaluation_count=2)
    experiment = small_experiment(GaussianSpec(), allocator=RewardStdAllocator(low=2, high=6), prompts=prompts)
    engine = Engine.build(experiment)
    assert np.isnan(engine.step(1).signals["reward-std"].values).all()
    known = engine.sources.measure(5, engine.asked(5)).signals
    assert np.isfinite(known.by_prompt("reward-std")).all()
    with pytest.raises(ContractError, match=r"no signal 'entropy' was measured: a part reads what it declares"):
        known.by_step("entropy")
    with pytest.raises(ContractError, match="signal 'reward-std' has values by prompt, none of denoising steps"):
        known.by_step("reward-std")


# --- sources that break their promise --------------------------------------------------------------------------------


class Odd(SignalSpec):
    """Returns what it is told to."""

    kind: Literal["odd"] = "odd"
    provides: ClassVar[Mapping[str, Per]] = {"oddity": "prompt"}

    def build(self, experiment):
        return self

    def measure(self, step, prompts, policy):
        return ANSWER[0](prompts)


ANSWER: list[Any] = []


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            lambda prompts: Measurement({"odd": np.zeros(2)}),
            "signals 'odd' measured 'odd'; it provides 'oddity'",
        ),
        (
            lambda prompts: Measurement({"oddity": np.zeros((2, 4))}),
            "signals 'odd' returned signal 'oddity' of shape (2, 4), float64; (2,), float64 was asked",
        ),
        (
            lambda prompts: Measurement({"oddity": np.array([np.inf, 0.0])}),
            "signals 'odd' returned an infinite value of signal 'oddity'; NaN says that it is unknown",
        ),
        (lambda prompts: {"oddity": np.zeros(2)}, "signals 'odd' measured a dict; an aegpo.Measurement was asked"),
        (lambda prompts: prompts[9], "signals 'odd' failed with IndexError: tuple index out of range"),
    ],
)
def test_a_source_that_breaks_its_promise_is_blamed(answer, message):
    ANSWER[:] = [answer]
    parts = {"allocator": MedianSplitAllocator(signal="oddity", low=2, high=6), "signals": {"odd": Odd()}}
    engine = Engine.build(small_experiment(GaussianSpec(), **parts))
    with pytest.raises(ContractError) as error:
        engine.step(1)
    assert error.value.message == message
    assert error.value.location == ("signals",)


class Asking(SignalSpec):
    """Cannot be built by its name alone."""

    kind: Literal["asking"] = "asking"
    provides: ClassVar[Mapping[str, Per]] = {"answer": "prompt"}
    question: str

    def measure(self, step, prompts, policy):
        return Measurement({})


def test_a_source_whose_options_have_no_defaults_is_refused_by_name():
    registries = load_registries(plugin_manager())
    registries.signals.add(Asking)
    with pytest.raises(PluginError, match="registers signals 'asking' without a default for 'question'; parts ask"):
        experiment_type(registries)


def declaring(provides: Any) -> type[SignalSpec]:
    class Declaring(Odd):
        """Says what it provides in its own way."""

        kind: Literal["declaring"] = "declaring"  # type: ignore[assignment]

    Declaring.provides = provides
    return Declaring


@pytest.mark.parametrize(
    ("provides", "wrong"),
    [
        (("letters",), "whose 'provides' is a tuple; a mapping of names to one of 'prompt', 'step', 'prompt-step' is"),
        ({"hump": "steps"}, "has 'hump' per 'steps'; must be 'prompt', 'step' or 'prompt-step'; mend it"),
        ({"My Hump": "step"}, "names a signal 'My Hump'; names are kebab-case, as my-signal"),
        (
            {"entropy": "prompt-step"},
            "the signal 'entropy' that 'entropy' of aegpo provides; rename one",
        ),
    ],
)
def test_a_source_that_declares_what_cannot_be_is_refused_when_it_is_registered(provides, wrong):
    registries = load_registries(plugin_manager())
    registries.signals.add(declaring(provides))
    with pytest.raises(PluginError) as error:
        check_declared(registries)
    assert error.value.message.startswith("aegpo registers signals 'declaring'")
    assert wrong in error.value.message


def test_a_text_where_a_tuple_of_names_is_meant_is_refused():
    class Reader(MedianSplitAllocator):
        """Forgot the comma."""

        reads: ClassVar[str] = "words"  # type: ignore[assignment]

    with pytest.raises(ContractError, match=r"'reads' is the text 'words'; a tuple of names is asked: write \('w"):
        small_experiment(GaussianSpec(), allocator=Reader(signal="words"))

    class Needy(BrightnessReward):
        """Forgot the comma."""

        kind: Literal["needy"] = "needy"  # type: ignore[assignment]
        needs_metadata: ClassVar[str] = "tint"  # type: ignore[assignment]

    registries = load_registries(plugin_manager())
    registries.rewards.add(Needy)
    with pytest.raises(PluginError, match=r"whose 'needs_metadata' is the text 'tint'; a tuple of keys is asked"):
        check_declared(registries)


def test_a_reward_that_compares_with_nothing_there_is_is_refused():
    class Comparing(BrightnessReward):
        """Compares with what no evaluation has."""

        kind: Literal["comparing"] = "comparing"  # type: ignore[assignment]
        compared_with: ClassVar[str] = "others"  # type: ignore[assignment]

    registries = load_registries(plugin_manager())
    registries.rewards.add(Comparing)
    with pytest.raises(PluginError, match=r"'comparing', whose 'compared_with' is 'others'; must be 'base' or 'own'"):
        check_declared(registries)


def test_sources_and_curricula_conform_or_are_blamed():
    for source in (EntropySignal(), RewardSignal(), StepNoiseSignal(), SettlingSignal()):
        check_signal(source)

    class Here(Odd):
        """In no module, which may import torch."""

    ANSWER[:] = [lambda prompts: Measurement({"oddity": np.zeros(9)})]
    with pytest.raises(ContractError, match=r"signals 'odd' returned signal 'oddity' of shape \(9,\)"):
        check_signal(Here())
    numbers = iter(range(1000))
    ANSWER[:] = [lambda prompts: Measurement({"oddity": np.full(len(prompts), float(next(numbers)))})]
    with pytest.raises(ContractError, match="signals 'odd' returned something else for the same"):
        check_signal(Here())
    for curriculum in (ShuffleCurriculum(), BoundaryCurriculum()):
        check_curriculum(curriculum)

    class Outside(ShuffleCurriculum):
        """Asks what it said it would not."""

        def build(self, prompts, per_step, seed):
            return Shifted(prompts, per_step, seed)

    class Shifted(Shuffle):
        def candidates(self, steps):
            return np.arange(1, dtype=np.int64)

    with pytest.raises(ContractError, match=r"curriculum 'shuffle' chose prompt .*, which is none of its candidates"):
        check_curriculum(Outside())


def test_a_part_whose_signal_no_source_provides_does_not_conform():
    with pytest.raises(ContractError, match="no installed source provides the signal 'knee'; known: entropy, "):
        check_allocator(MedianSplitAllocator(signal="knee"))


def test_the_stranger_is_no_part_of_the_box():
    assert "settling" not in load_registries(plugin_manager()).signals.names
    assert "settling" in load_registries(plugin_manager([str(ROOT / "tests" / "settling.py")])).signals.names
