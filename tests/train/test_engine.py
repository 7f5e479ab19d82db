"""The engine: equal arms are equal bit for bit, and a run that stops and goes on is the run that never stopped."""

from __future__ import annotations

import copy
import gc
import types
from typing import Literal

import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel
from worlds import BrightnessReward, GaussianModel, GaussianSpec, recorded_gradients, run_loop, small_experiment

import aegpo
from aegpo.core.experiment import EvaluationSpec
from aegpo.core.experiment_type import experiment_type
from aegpo.core.parts import AllocatorSpec, RewardSpec
from aegpo.core.reports import Evaluation, StepReport
from aegpo.core.sections import CheckpointSpec, OptimizerSpec, PolicySpec, PromptsSpec, RolloutsSpec
from aegpo.errors import AegpoError, ContractError
from aegpo.method.advantages import DepthAdvantage
from aegpo.method.allocators import EntropyAllocator, RandomAllocator, UniformAllocator
from aegpo.method.objectives import ClippedObjective
from aegpo.method.samplers import DanceSde
from aegpo.method.selectors import EntropyPeakSelector, MergedSelector, RandomSelector, UniformSelector
from aegpo.method.signals import EntropySignal
from aegpo.method.trees import BranchingTree, IndependentTree
from aegpo.plugin.manager import load_registries, plugin_manager
from aegpo.prompts.lists import numbered
from aegpo.rewards.palette import PaletteReward
from aegpo.runs import checkpoints
from aegpo.train.engine import Engine

FAST = OptimizerSpec(learning_rate=0.01)
LORA = PolicySpec(train="lora", rank=2, alpha=4, ema=0.9)
BUDGET = RolloutsSpec(prompts_per_step=2, rollouts_per_step=12, denoising_steps=4)
SPLIT = {"low": 4, "high": 8}


class Recorder:
    """Everything a run tells its observers, in order."""

    def __init__(self):
        self.events: list[str] = []
        self.reports: list[StepReport] = []
        self.evaluations: dict[int, Evaluation] = {}

    @aegpo.hookimpl
    def aegpo_on_run_start(self, run):
        self.events.append(f"start after {run.first_step}")

    @aegpo.hookimpl
    def aegpo_on_step_end(self, run, report):
        self.events.append(f"step {report.step}")
        self.reports.append(report)

    @aegpo.hookimpl
    def aegpo_on_evaluation(self, run, step, evaluation):
        self.events.append(f"evaluated {step}")
        self.evaluations[step] = evaluation

    @aegpo.hookimpl
    def aegpo_on_checkpoint(self, run, step, path):
        assert checkpoints.load_latest(path.parent).step == step
        self.events.append(f"checkpoint {step}")

    @aegpo.hookimpl
    def aegpo_on_run_end(self, run, outcome):
        self.events.append(outcome)


def build(experiment) -> tuple[Engine, Recorder]:
    return Engine.build(experiment), Recorder()


def run(experiment, folder, stop_after: int | None = None) -> tuple[Engine, Recorder, str]:
    """Runs an experiment, from its newest checkpoint if there is one; asks it to stop before step `stop_after` + 1."""
    engine, recorder = build(experiment)

    def should_stop() -> bool:
        steps = [int(event.split()[-1]) for event in recorder.events if event.startswith(("start", "step"))]
        return stop_after is not None and steps[-1] >= stop_after

    return engine, recorder, run_loop(engine, folder, {"recorder": recorder}, should_stop)


def painted(engine: Engine) -> torch.Tensor:
    """What the policy paints of the held-out prompts now."""
    prompts = numbered(engine.evaluator.prompts)
    return engine.policy.images(prompts, engine.policy.evaluation_noise(prompts))


def assert_same_weights(one: Engine, other: Engine) -> None:
    mine, yours = (engine.policy.model.policy.state_dict() for engine in (one, other))
    assert mine.keys() == yours.keys()
    for name, weight in mine.items():
        assert torch.equal(weight, yours[name]), name


def assert_same_report(one: StepReport, other: StepReport) -> None:
    """Everything but the wall-clock, bit for bit."""
    assert one.step == other.step
    assert dict(one.metrics) == dict(other.metrics)
    assert one.prompts == other.prompts
    assert np.array_equal(one.counts, other.counts)
    assert np.array_equal(one.selected, other.selected)
    assert one.signals.keys() == other.signals.keys()
    for name, signal in one.signals.items():
        assert np.array_equal(signal.values, other.signals[name].values, equal_nan=True), name


def assert_same_evaluations(one: Recorder, *others: Recorder) -> None:
    """What runs evaluated, one of them perhaps in parts, bit for bit."""
    together = {step: found for other in others for step, found in other.evaluations.items()}
    assert one.evaluations.keys() == together.keys()
    for step, mine in one.evaluations.items():
        yours = together[step]
        assert torch.equal(mine.images, yours.images)
        for ours, theirs in ((mine.scores, yours.scores), (mine.base_scores, yours.base_scores)):
            assert ours.keys() == theirs.keys()
            assert all(np.array_equal(ours[label], theirs[label]) for label in ours)


# --- equal arms ------------------------------------------------------------------------------------------------------


def without_signals(metrics):
    """The metrics of a step, less what its signals cost."""
    return {**metrics, "signal_forwards": 0, "work": metrics["work"] - metrics["signal_forwards"]}


def test_the_entropy_allocator_in_warm_up_is_the_uniform_one(tiny_spec):
    uniform = small_experiment(tiny_spec, rollouts=BUDGET, optimizer=FAST)
    warming = uniform.model_copy(update={"allocator": EntropyAllocator(**SPLIT, warmup=3)})
    one, other = build(uniform)[0], build(warming)[0]
    for number in (1, 2):
        plain, probed = one.step(number), other.step(number)
        assert plain.metrics["signal_forwards"] == 0
        assert probed.metrics["signal_forwards"] == 2 * 2 * 4
        assert without_signals(probed.metrics) == plain.metrics
        assert np.array_equal(plain.counts, probed.counts)
        assert plain.signals == {}
        assert set(probed.signals) == {"entropy", "entropy-delta"}
    assert_same_weights(one, other)


def test_all_peaks_are_the_uniform_selector(tiny_spec):
    uniform = small_experiment(tiny_spec, optimizer=FAST, selector=UniformSelector(last=True))
    peaks = uniform.model_copy(update={"selector": EntropyPeakSelector(top_k=4, last=True)})
    one, other = build(uniform)[0], build(peaks)[0]
    plain, probed = one.step(1), other.step(1)
    assert np.array_equal(plain.selected, probed.selected)
    assert without_signals(probed.metrics) == plain.metrics
    assert_same_weights(one, other)


def test_the_tree_split_at_the_root_is_independent_rollouts_with_shared_noise():
    shared = small_experiment(GaussianSpec(), optimizer=FAST, tree=IndependentTree(start="shared"))
    split = shared.model_copy(update={"tree": BranchingTree(factor=4)})
    one, other = build(shared)[0], build(split)[0]
    for number in (1, 2):
        assert dict(one.step(number).metrics) == dict(other.step(number).metrics)
    assert_same_weights(one, other)


def test_the_same_arm_and_seed_are_the_same_run_and_another_seed_is_another():
    experiment = small_experiment(GaussianSpec(), optimizer=FAST, allocator=RandomAllocator(low=2, high=6))
    one, again, other = (build(experiment.model_copy(update={"seed": seed}))[0] for seed in (3, 3, 4))
    for number in (1, 2):
        assert_same_report(one.step(number), again.step(number))
        other.step(number)
    assert_same_weights(one, again)
    assert not torch.equal(one.policy.model.policy.mean, other.policy.model.policy.mean)


@pytest.mark.parametrize("policy", [PolicySpec(), LORA], ids=["full", "lora"])
def test_a_new_engine_does_not_depend_on_what_the_process_did_before(tiny_spec, policy):
    experiment = small_experiment(tiny_spec, policy=policy)
    engines = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        engines.append(build(experiment)[0])
    assert_same_weights(*engines)


def test_lora_keeps_a_single_copy_of_the_network(tiny_spec):
    def networks() -> int:
        gc.collect()
        return sum(type(thing) is SD3Transformer2DModel for thing in gc.get_objects())

    before = networks()
    engine, _ = build(small_experiment(tiny_spec, policy=LORA))
    engine.step(1)
    engine.evaluator.evaluate()
    assert networks() - before == 1


# --- a step ----------------------------------------------------------------------------------------------------------


def test_a_step_reports_what_it_did_and_what_it_cost():
    experiment = small_experiment(
        GaussianSpec(), allocator=RandomAllocator(low=2, high=6), selector=RandomSelector(top_k=2)
    )
    engine, _ = build(experiment)
    report = engine.step(1)
    assert report.step == 1
    assert report.prompts == engine.asked(1)
    assert sorted(report.counts) == [2, 6]
    assert report.selected.sum(axis=1).tolist() == [2, 2]
    assert set(report.seconds) == {"signals", "plan", "rollout", "reward", "update"}
    metrics = report.metrics
    assert metrics["forwards"] == 8 * 4
    assert metrics["trained_edges"] == 8 * 2
    assert metrics["signal_forwards"] == 0
    assert metrics["work"] == 8 * 4 + 3 * 8 * 2
    assert metrics["reward"] == metrics["reward/brightness"]
    assert 0 < metrics["reward_std"] < 1
    assert metrics["ratio_error"] == 0.0
    assert set(metrics) == {
        *("reward", "reward_std", "reward/brightness", "loss", "ratio", "clipped", "approx_kl", "ratio_error"),
        *("grad_norm", "updated_edges", "forwards", "signal_forwards", "trained_edges", "work", "residual_noise"),
        "gradient_rows",
    }


def test_the_reward_is_the_weighted_sum(tiny_spec):
    rewards = (BrightnessReward(weight=2.0), BrightnessReward(name="dark", weight=-0.5))
    metrics = build(small_experiment(GaussianSpec(), rewards=rewards))[0].step(1).metrics
    assert metrics["reward"] == pytest.approx(1.5 * metrics["reward/brightness"], abs=1e-6)
    assert metrics["reward/dark"] == metrics["reward/brightness"]


@pytest.mark.parametrize(
    "changes",
    [
        {"advantage": DepthAdvantage(weighting="path"), "tree": BranchingTree()},
        {"objective": ClippedObjective(beta=0.1, step_weight="std")},
        {"tree": IndependentTree(noise="all"), "selector": RandomSelector(top_k=1)},
        {"rollouts": RolloutsSpec(prompts_per_step=2, rollouts_per_step=8, denoising_steps=4, storage="bfloat16")},
        {"optimizer": OptimizerSpec(rollouts_per_update=2, inner_epochs=2, reduction="rollout", max_grad_norm=None)},
    ],
    ids=["depth", "kl", "sde elsewhere", "bfloat16 storage", "many updates"],
)
def test_parts_and_options_work_together(changes):
    engine, _ = build(small_experiment(GaussianSpec(), **changes))
    before = engine.policy.model.policy.mean.detach().clone()
    metrics = engine.step(1).metrics
    assert metrics["ratio_error"] == 0.0
    assert not torch.equal(engine.policy.model.policy.mean, before)


def test_every_aegpo_part_works_together(tiny_spec):
    experiment = small_experiment(
        tiny_spec,
        rollouts=BUDGET,
        rewards=(PaletteReward(), BrightnessReward()),
        allocator=EntropyAllocator(**SPLIT, warmup=0),
        selector=EntropyPeakSelector(top_k=3),
        tree=BranchingTree(),
        optimizer=FAST,
    )
    engine, _ = build(experiment)
    first, second = engine.step(1), engine.step(2)
    assert first.counts.tolist() == [6, 6]  # the policy is the base: every delta ties at zero
    assert first.signals["entropy-delta"].values.tolist() == [0.0, 0.0]
    assert sorted(second.counts) == [4, 8]
    assert second.counts[second.signals["entropy-delta"].values.argmax()] == 8
    for report in (first, second):
        entropy = report.signals["entropy"].values
        highest = np.sort(entropy[:, :3], axis=1)
        assert np.array_equal(np.sort(entropy[report.selected].reshape(2, 3), axis=1), highest)


def test_training_raises_the_reward():
    rollouts = RolloutsSpec(prompts_per_step=4, rollouts_per_step=32, denoising_steps=4)
    experiment = small_experiment(GaussianSpec(), rollouts=rollouts, optimizer=OptimizerSpec(learning_rate=0.02))
    engine, _ = build(experiment)
    before = engine.evaluator.evaluate()
    for number in range(1, 16):
        engine.step(number)
    after = engine.evaluator.evaluate()
    assert after.scores["brightness"].mean() > before.scores["brightness"].mean() + 0.03
    assert np.array_equal(after.base_scores["brightness"], before.scores["brightness"])


@pytest.mark.parametrize(
    "parts", [{}, {"allocator": RandomAllocator(low=2, high=6)}, {"selector": RandomSelector(top_k=2)}]
)
def test_baselines_never_look_at_the_attention(tiny_spec, parts, monkeypatch):
    engine, _ = build(small_experiment(tiny_spec, **parts))
    asked: list[object] = []
    original = engine.policy.model.tap_attention
    monkeypatch.setattr(engine.policy.model, "tap_attention", lambda tap: asked.append(tap) or original(tap))
    assert engine.step(1).metrics["signal_forwards"] == 0
    engine.evaluator.evaluate()
    assert not asked
    assert engine.sources.built == {}


def test_the_probe_pays_for_each_prompts_base_once(tiny_spec):
    experiment = small_experiment(
        tiny_spec, prompts=PromptsSpec(train_count=4, evaluation_count=4), selector=EntropyPeakSelector(top_k=2)
    )
    engine, _ = build(experiment)
    assert [engine.step(number).metrics["signal_forwards"] for number in (1, 2, 3, 4)] == [16, 16, 8, 8]


def test_gradients_are_clipped_to_the_norm():
    raw = small_experiment(GaussianSpec(), optimizer=OptimizerSpec(max_grad_norm=None))
    clipped = raw.model_copy(update={"optimizer": OptimizerSpec(max_grad_norm=0.01)})
    with recorded_gradients() as seen:
        reports = [build(experiment)[0].step(1) for experiment in (raw, clipped)]
    norms = [float(gradient.norm()) for (gradient,) in seen]
    assert reports[0].metrics["grad_norm"] == reports[1].metrics["grad_norm"] == pytest.approx(norms[0], rel=1e-5)
    assert norms[0] > 0.02
    assert norms[1] == pytest.approx(0.01, rel=1e-3)


def test_bfloat16_precision_trains_float32_weights(tiny_spec):
    engine, _ = build(small_experiment(tiny_spec, precision="bfloat16", optimizer=FAST))
    metrics = engine.step(1).metrics
    assert metrics["ratio_error"] < 0.05
    assert metrics["grad_norm"] > 0
    assert {weight.dtype for weight in engine.policy.model.policy.parameters()} == {torch.float32}


# --- evaluation ------------------------------------------------------------------------------------------------------


def test_evaluation_is_the_same_every_time_and_begins_at_the_base():
    engine, _ = build(small_experiment(GaussianSpec()))
    first, again = engine.evaluator.evaluate(), engine.evaluator.evaluate()
    assert first.prompts == engine.evaluator.prompts
    assert torch.equal(first.images, again.images)
    assert first.images.shape == (2, 3, 4, 4)
    assert np.array_equal(first.scores["brightness"], again.scores["brightness"])
    assert np.array_equal(first.scores["brightness"], first.base_scores["brightness"])


def test_evaluation_between_steps_changes_nothing():
    experiment = small_experiment(GaussianSpec(), optimizer=FAST)
    one, other = build(experiment)[0], build(experiment)[0]
    for number in (1, 2):
        torch.manual_seed(number)
        other.evaluator.evaluate()
        assert_same_report(one.step(number), other.step(number))
    assert_same_weights(one, other)


def test_the_averaged_weights_are_evaluated_and_the_current_ones_trained():
    experiment = small_experiment(GaussianSpec(), optimizer=FAST, policy=PolicySpec(ema=0.5))
    engine, _ = build(experiment)
    for number in (1, 2, 3):
        engine.step(number)
    current = engine.policy.model.policy.mean.detach().clone()
    averaged = engine.policy.weights.average.values["mean"].clone()
    assert not torch.equal(current, averaged)
    evaluated = engine.evaluator.evaluate()
    assert torch.equal(engine.policy.model.policy.mean, current)
    with torch.no_grad():
        engine.policy.model.policy.mean.copy_(averaged)
    assert torch.equal(painted(engine)[:2], evaluated.images)


def test_guards_are_scored_but_never_trained_on():
    plain = small_experiment(GaussianSpec(), optimizer=FAST)
    guarded = plain.model_copy(
        update={"evaluation": EvaluationSpec(rewards=(BrightnessReward(name="guard"),), denoising_steps=6)}
    )
    one, other = build(plain)[0], build(guarded)[0]
    assert dict(one.step(1).metrics) == dict(other.step(1).metrics)
    assert set(other.evaluator.evaluate().scores) == {"brightness", "guard"}
    assert set(one.evaluator.evaluate().scores) == {"brightness"}


# --- runs ------------------------------------------------------------------------------------------------------------


def test_observers_are_told_everything_in_order(tmp_path):
    experiment = small_experiment(
        GaussianSpec(), training_steps=5, evaluation=EvaluationSpec(every=2), checkpoint=CheckpointSpec(every=3)
    )
    _, recorder, outcome = run(experiment, tmp_path)
    assert outcome == "finished"
    assert recorder.events == [
        "start after 0",
        "evaluated 0",
        "step 1",
        "step 2",
        "evaluated 2",
        "step 3",
        "checkpoint 3",
        "step 4",
        "evaluated 4",
        "step 5",
        "evaluated 5",
        "checkpoint 5",
        "finished",
    ]


def test_a_run_asked_to_stop_saves_its_state_and_goes_on_later(tmp_path):
    experiment = small_experiment(GaussianSpec(), training_steps=5, checkpoint=CheckpointSpec(every=4))
    _, recorder, outcome = run(experiment, tmp_path, stop_after=2)
    assert outcome == "interrupted"
    assert recorder.events == [
        "start after 0",
        "evaluated 0",
        "step 1",
        "step 2",
        "evaluated 2",
        "checkpoint 2",
        "interrupted",
    ]
    _, recorder, outcome = run(experiment, tmp_path)
    assert outcome == "finished"
    assert recorder.events[:2] == ["start after 2", "step 3"]
    _, recorder, outcome = run(experiment, tmp_path)
    assert (recorder.events, outcome) == (["start after 5", "finished"], "finished")


def test_stopping_right_after_a_checkpoint_does_not_write_it_again(tmp_path):
    experiment = small_experiment(GaussianSpec(), training_steps=5, checkpoint=CheckpointSpec(every=2))
    _, recorder, _ = run(experiment, tmp_path, stop_after=2)
    assert recorder.events.count("checkpoint 2") == 1
    _, recorder, outcome = run(experiment, tmp_path, stop_after=2)
    assert (recorder.events, outcome) == (["start after 2", "interrupted"], "interrupted")


AEGPO = {
    "rollouts": BUDGET,
    "allocator": EntropyAllocator(**SPLIT),
    "selector": EntropyPeakSelector(top_k=2),
    "tree": BranchingTree(),
    "prompts": PromptsSpec(train_count=3, evaluation_count=3),
}
KINDS_OF_RUN = {
    "full": {},
    "aegpo": AEGPO,
    "aegpo, rows and a trunk": {
        **AEGPO,
        "signals": {"entropy": EntropySignal(rows=16, steps=(0, 1, 2), source="rollout", refresh=3)},
    },
    "lora and ema": {**AEGPO, "policy": LORA},
    "controls with many updates": {
        "rollouts": BUDGET,
        "allocator": RandomAllocator(**SPLIT),
        "selector": RandomSelector(top_k=2),
        "optimizer": OptimizerSpec(learning_rate=0.01, rollouts_per_update=4, inner_epochs=2),
    },
    "joined steps": {"selector": MergedSelector(start=1, length=2), "objective": ClippedObjective(step_weight="std")},
    "wider splits": {"tree": BranchingTree(split_noise=4), "sampler": DanceSde(std_only=True)},
}


@pytest.mark.parametrize("changes", KINDS_OF_RUN.values(), ids=KINDS_OF_RUN)
def test_stop_and_resume_is_the_run_that_never_stopped(tiny_spec, tmp_path, changes):
    experiment = small_experiment(tiny_spec, checkpoint=CheckpointSpec(every=3), **({"optimizer": FAST} | changes))
    straight, told, _ = run(experiment, tmp_path / "straight")
    torch.manual_seed(1)  # other processes begin with other generators
    _, before, _ = run(experiment, tmp_path / "broken", stop_after=2)
    torch.manual_seed(2)
    resumed, after, _ = run(experiment, tmp_path / "broken")
    assert_same_weights(straight, resumed)
    reports = before.reports + after.reports
    assert [report.step for report in reports] == [1, 2, 3, 4]
    assert_same_evaluations(told, before, after)
    for one, other in zip(told.reports, reports, strict=True):
        assert_same_report(one, other)
    one, other = (checkpoints.load_latest(tmp_path / name / "checkpoints") for name in ("straight", "broken"))
    assert one.tensors.keys() == other.tensors.keys()
    for name, tensor in one.tensors.items():  # NaN, at steps that were not measured, counts as equal
        torch.testing.assert_close(tensor, other.tensors[name], atol=0, rtol=0, equal_nan=True)
    assert one.state == other.state
    kept = [sorted(path.name for path in (tmp_path / name / "signals").rglob("*.*")) for name in ("straight", "broken")]
    assert bool(kept[0]) == bool(kept[1]) == bool(experiment.sources)


# --- foreign parts ---------------------------------------------------------------------------------------------------


class Alternating:
    """Gives the first prompts more at odd calls and fewer at even ones, and is an observer too."""

    def __init__(self, spec: AlternatingAllocator) -> None:
        self.spec, self.calls, self.totals, self.told = spec, 0, torch.zeros(2, dtype=torch.int64), []

    def allocate(self, signals, budget, rng):
        self.calls += 1
        counts = np.full(signals.num_prompts, budget // signals.num_prompts, dtype=np.int64)
        counts[:: signals.num_prompts - 1] += np.array([1, -1]) * (1 if self.calls % 2 else -1)
        self.totals += torch.from_numpy(counts)
        return counts

    def state_dict(self):
        return {"calls": self.calls, "totals": self.totals}

    def load_state_dict(self, state):
        self.calls, self.totals = state["calls"], state["totals"]

    @aegpo.hookimpl
    def aegpo_on_step_end(self, run, report):
        self.told.append(report.step)


class AlternatingAllocator(AllocatorSpec):
    """A part with memory, as a plugin would bring it."""

    kind: Literal["alternating"] = "alternating"

    def build(self):
        return Alternating(self)


@pytest.fixture
def alternating():
    """The experiment with the plugin's part, validated against what is registered."""
    plugin = types.ModuleType("alternating_plugin")

    @aegpo.hookimpl
    def aegpo_register_allocators(registry):
        registry.add(AlternatingAllocator)

    @aegpo.hookimpl
    def aegpo_register_models(registry):
        registry.add(GaussianSpec)

    @aegpo.hookimpl
    def aegpo_register_rewards(registry):
        registry.add(BrightnessReward)

    plugin.aegpo_register_allocators = aegpo_register_allocators
    plugin.aegpo_register_models = aegpo_register_models
    plugin.aegpo_register_rewards = aegpo_register_rewards
    manager = plugin_manager()
    manager.register(plugin, "alternating")
    plain = small_experiment(GaussianSpec(), training_steps=5, checkpoint=CheckpointSpec(every=5))
    values = plain.model_dump() | {"allocator": "alternating"}
    return experiment_type(load_registries(manager)).model_validate(values)


def test_a_part_with_state_is_stored_in_checkpoints_and_restored(alternating, tmp_path):
    straight, told, _ = run(alternating, tmp_path / "straight")
    _, before, _ = run(alternating, tmp_path / "broken", stop_after=3)
    saved = checkpoints.load_latest(tmp_path / "broken" / "checkpoints")
    assert saved.state["parts"]["allocator"] == {"calls": 3}
    assert saved.tensors["part/allocator/totals"].sum() == 3 * 8
    resumed, after, _ = run(alternating, tmp_path / "broken")
    assert resumed.planner.allocator.calls == 5
    assert torch.equal(resumed.planner.allocator.totals, straight.planner.allocator.totals)
    counts = [report.counts.tolist() for report in before.reports + after.reports]
    assert counts == [[5, 3], [3, 5], [5, 3], [3, 5], [5, 3]]
    assert_same_weights(straight, resumed)
    for one, other in zip(told.reports, before.reports + after.reports, strict=True):
        assert_same_report(one, other)


def test_a_part_may_observe_the_run_it_is_part_of(alternating, tmp_path):
    engine, _, _ = run(alternating, tmp_path)
    assert engine.planner.allocator.told == [1, 2, 3, 4, 5]


class GreedyAllocator(UniformAllocator):
    """Spends one rollout too many."""

    def allocate(self, signals, budget, rng):
        counts = super().allocate(signals, budget, rng)
        counts[0] += 1
        return counts


class BrokenReward(BrightnessReward):
    """Not a number for every image."""

    def score(self, images, prompts):
        return super().score(images, prompts) * torch.nan


def test_a_part_that_breaks_its_contract_is_blamed_by_name():
    engine, _ = build(small_experiment(GaussianSpec(), allocator=GreedyAllocator()))
    with pytest.raises(ContractError, match="allocator 'uniform' returned 9 rollouts for a budget of 8"):
        engine.step(1)
    engine, _ = build(small_experiment(GaussianSpec(), rewards=(BrokenReward(name="broken"),)))
    with pytest.raises(ContractError, match="reward 'broken' returned a non-finite score for prompt '0\\."):
        engine.step(1)


# --- devices ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused():
    with pytest.raises(AegpoError) as error:
        build(small_experiment(GaussianSpec(), device="cuda:0"))
    assert str(error.value) == "device 'cuda:0' was asked for, but torch sees no CUDA device; use 'auto' or 'cpu'"


def test_half_precision_without_a_gpu_is_refused():
    with pytest.raises(AegpoError) as error:
        build(small_experiment(GaussianSpec(), precision="float16"))
    assert str(error.value) == ("precision 'float16' needs a CUDA device, not 'cpu'; use 'bfloat16' or 'float32'")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_device_auto_is_the_cpu_where_there_is_nothing_else():
    engine, _ = build(small_experiment(GaussianSpec(), device="auto"))
    assert engine.policy.device == torch.device("cpu")


def test_runs_of_one_process_may_differ_in_precision(tiny_spec):
    half = small_experiment(tiny_spec, precision="bfloat16")
    full = small_experiment(tiny_spec)
    expected = build(full)[0].step(1)
    first, second = build(full)[0], build(half)[0]  # built after it
    assert_same_report(first.step(1), expected)
    assert second.step(1).metrics["grad_norm"] != expected.metrics["grad_norm"]
    assert_same_report(build(full)[0].step(1), expected)


def test_a_learning_rate_that_ruins_the_policy_is_blamed_on_training(tiny_spec):
    ruined = small_experiment(tiny_spec, optimizer=OptimizerSpec(learning_rate=1000, max_grad_norm=None))
    engine, _ = build(ruined)
    with pytest.raises(AegpoError, match="training diverged"):
        _ = [engine.step(number) for number in range(1, 5)]


class Misbehaving(RewardSpec):
    """Does what a reward must not do."""

    kind: Literal["misbehaving"] = "misbehaving"
    how: str

    def score(self, images, prompts):
        if self.how == "raises":
            raise ValueError("no such file")
        if self.how == "writes":
            images.zero_()
        return [0.0] * len(prompts) if self.how == "lists" else images.mean(dim=(1, 2, 3))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raises", "reward 'misbehaving' failed with ValueError: no such file"),
        ("writes", "reward 'misbehaving' changed the images in place, which others still need; copy them first"),
        ("lists", "reward 'misbehaving' returned scores as list; a tensor was asked"),
    ],
)
def test_a_reward_that_misbehaves_is_blamed_by_name(how, message):
    engine, _ = build(small_experiment(GaussianSpec(), rewards=(Misbehaving(how=how),)))
    with pytest.raises(ContractError) as error:
        engine.step(1)
    assert str(error.value) == message


class SizedModel(GaussianModel):
    """A model that is told the size of its images, as SDXL is, and remembers which one it was asked for."""

    def __init__(self, spec):
        super().__init__(spec)
        self.size, self.asked = (4, 4), []

    def at(self, height: int, width: int) -> SizedModel:
        other = copy.copy(self)  # shares `asked`
        other.size = (height, width)
        return other

    def velocity(self, latents, sigma, cond):
        self.asked.append(self.size)
        return super().velocity(latents, sigma, cond)


class SizedSpec(GaussianSpec):
    kind: Literal["sized"] = "sized"

    def build(self, device):
        return SizedModel(self)


def test_evaluation_asks_the_model_at_its_own_size_and_training_at_the_models():
    evaluation = EvaluationSpec(every=2, images=2, height=6, width=8)
    engine = Engine.build(small_experiment(SizedSpec(), evaluation=evaluation))
    engine.policy.model.asked.clear()
    painted(engine)
    assert set(engine.policy.model.asked) == {(6, 8)}
    engine.policy.model.asked.clear()
    engine.step(1)
    assert set(engine.policy.model.asked) == {(4, 4)}
