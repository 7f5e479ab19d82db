"""Learning from clean latents noised again, the sampling policy that lags behind, and what an update leaves out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import pytest
import torch
from test_engine import assert_same_report, assert_same_weights, build, run
from test_learning import NO_CHANGE, gradients, sampled
from worlds import GaussianSpec, execution, learner, plan_of, recorded_gradients, run_loop, small_experiment

from aegpo.core.experiment import EvaluationSpec
from aegpo.core.records import RolloutPlan
from aegpo.core.sections import CheckpointSpec, OptimizerSpec, PolicySpec
from aegpo.method.objectives import (
    ClippedObjective,
    GuardedObjective,
    MatchingObjective,
    NftObjective,
    PreferenceObjective,
)
from aegpo.method.trees import BranchingTree, IndependentTree
from aegpo.rewards.palette import PaletteReward
from aegpo.runs.checkpoints import load_latest
from aegpo.runs.trackers import ConsoleTracker, JsonlTracker
from aegpo.train.edges import edge_weights
from aegpo.train.noise import StepNoise
from aegpo.train.replay import noise_again
from aegpo.train.weights import WeightCopy

CPU = torch.device("cpu")
FAST = OptimizerSpec(learning_rate=0.01, rollouts_per_update=4)


def quiet(plan: RolloutPlan) -> RolloutPlan:
    """The same plan without any noise, as a deterministic sampler would leave it."""
    return replace(plan, noisy=tuple(np.zeros_like(level) for level in plan.noisy))


DETERMINISTIC = quiet(plan_of(IndependentTree(), [3, 5], [[1, 1, 1, 0], [1, 0, 1, 0]]))


@pytest.fixture
def how():
    return execution(GaussianSpec().build(CPU), 4)


# --- noised again ----------------------------------------------------------------------------------------------------


def test_each_edge_is_its_rollouts_clean_latents_with_noise_of_its_own(how):
    rollouts, _, _ = sampled(how, DETERMINISTIC)
    edges = noise_again(how, rollouts, StepNoise(7))
    noise = StepNoise(7).again(edges.level.numpy(), edges.rollout.numpy(), how.model.latent_shape)
    clean = rollouts.latents[edges.rollout]
    sigma = how.sigmas[edges.level].view(-1, 1, 1, 1)
    assert torch.equal(edges.next_latents, clean)
    torch.testing.assert_close(edges.latents, (1 - sigma) * clean + sigma * noise)
    assert torch.equal(edges.latents[edges.level == 0], noise[edges.level == 0])  # sigma 1 is nothing but noise
    for name in ("level", "prompt", "rollout", "leaves"):
        assert torch.equal(vars(edges)[name], vars(rollouts.edges)[name])


def test_the_noise_is_standard_and_independent_from_edge_to_edge(how):
    plan = quiet(plan_of(IndependentTree(), [200, 200], [[1, 1, 1, 0]] * 2))
    rollouts, _, _ = sampled(how, plan)
    edges = noise_again(how, rollouts, StepNoise(0))
    sigma = how.sigmas[edges.level].view(-1, 1, 1, 1)
    noise = ((edges.latents - (1 - sigma) * edges.next_latents) / sigma).flatten(1)  # (1200, 16)
    count = noise.numel()
    assert abs(float(noise.mean())) < 4 / count**0.5
    assert abs(float(noise.var()) - 1) < 4 * (2 / count) ** 0.5
    for row in torch.corrcoef(torch.stack([noise[edges.level == level].flatten() for level in range(3)])):
        assert float(row.abs().sort().values[1]) < 4 / (count / 3) ** 0.5


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16])
def test_clean_latents_noised_again_are_kept_in_the_storage_dtype(storage):
    how = execution(GaussianSpec().build(CPU), 4, storage=storage)
    rollouts, _, _ = sampled(how, DETERMINISTIC)
    assert noise_again(how, rollouts, StepNoise(0)).latents.dtype == storage


# --- an update of the forward process --------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", [MatchingObjective(), NftObjective(velocity_penalty=0.1)], ids=lambda o: o.kind)
def test_a_forward_update_learns_without_any_noise_in_the_rollouts(how, objective):
    rollouts, credit, cond = sampled(how, DETERMINISTIC)
    assert not any(level.any() for level in rollouts.log_prob)
    trained = learner(how, objective, learning_rate=0.01)
    metrics = trained.update(rollouts, credit, cond, np.random.default_rng(0), StepNoise(0))
    assert metrics["ratio"] == pytest.approx(1.0, abs=1e-6)
    assert metrics["approx_kl"] == pytest.approx(0.0, abs=1e-12)
    assert "ratio_error" not in metrics  # of stored transitions; there are none
    assert metrics["updated_edges"] == len(rollouts.edges)
    assert metrics["grad_norm"] > 0
    assert trained.updates == 1
    assert not torch.equal(how.model.policy.mean, torch.zeros_like(how.model.policy.mean))


@pytest.mark.parametrize("micro_batch", [64, 5])
def test_the_gradient_of_a_forward_update_is_that_of_the_weighted_matching_losses(how, micro_batch):
    """At ratio 1, d loss = A d mean (v - (noise - x0))^2, weighed as every other loss is."""
    rollouts, credit, cond = sampled(how, DETERMINISTIC)
    edges = noise_again(how, rollouts, StepNoise(3))
    sigma = how.sigmas[edges.level]
    velocity = how.model.velocity(edges.latents, sigma, cond.select(edges.prompt))
    target = (edges.latents - edges.next_latents) / sigma.view(-1, 1, 1, 1)
    error = (velocity - target).square().flatten(1).mean(dim=1)
    loss = (edge_weights(edges, "prompt").float() * credit * error).sum()
    (expected,) = torch.autograd.grad(loss, how.model.policy.mean)
    trained = learner(how, MatchingObjective(), **NO_CHANGE, micro_batch=micro_batch)
    with recorded_gradients() as seen:
        trained.update(rollouts, credit, cond, np.random.default_rng(3), StepNoise(3))
    torch.testing.assert_close(seen[0][0], expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("objective", [MatchingObjective(clip=0.1), NftObjective()], ids=lambda o: o.kind)
def test_a_forward_update_makes_what_was_credited_likelier(how, objective):
    plan = quiet(plan_of(IndependentTree(), [8, 8], [[1, 1, 1, 0]] * 2))
    trained = learner(how, objective, learning_rate=0.003)
    for seed in range(20):
        with trained.weights.active(trained.weights.old):
            batch = sampled(how, plan, seed=seed)
        trained.update(*batch, np.random.default_rng(seed), StepNoise(seed))
        trained.end_step(seed + 1)
    assert float(how.model.policy.mean.detach().mean()) > 0.01  # brighter, which is what is rewarded


def test_the_old_velocity_is_that_of_the_policy_that_sampled_not_of_the_trained_one(how):
    objective = NftObjective(velocity_penalty=0.0)
    trained = learner(how, objective, learning_rate=0.05, inner_epochs=2)
    batch = sampled(how, DETERMINISTIC)
    trained.update(*batch, np.random.default_rng(0), StepNoise(0))
    assert trained.update(*batch, np.random.default_rng(0), StepNoise(0))["ratio"] != pytest.approx(1.0, abs=1e-6)


# --- the policy that samples lags behind -----------------------------------------------------------------------------


class Frozen(NftObjective):
    """NFT whose sampling policy never moves."""

    kind: Literal["frozen"] = "frozen"

    def old_decay(self, step: int) -> float:
        return 1.0


class Quoting(MatchingObjective):
    """AWM with a sampling policy that keeps half of itself."""

    kind: Literal["quoting"] = "quoting"
    keeps_old: ClassVar[bool] = True

    def old_decay(self, step: int) -> float:
        return 0.5


def test_rollouts_are_sampled_by_the_old_policy_and_evaluations_are_not():
    frozen = small_experiment(GaussianSpec(), objective=Frozen(), optimizer=FAST)
    still = frozen.model_copy(update={"optimizer": OptimizerSpec(learning_rate=1e-30, weight_decay=0.0)})
    lagging, unmoved = build(frozen)[0], build(still)[0]
    for number in (1, 2, 3):
        mine, theirs = lagging.step(number).metrics, unmoved.step(number).metrics
        assert mine["reward"] == theirs["reward"]  # the same images, although the trained policy has moved
    assert not torch.equal(lagging.policy.model.policy.mean, unmoved.policy.model.policy.mean)
    assert not np.array_equal(
        lagging.evaluator.evaluate().scores["brightness"], unmoved.evaluator.evaluate().scores["brightness"]
    )  # of the trained policy


def test_the_old_policy_comes_nearer_at_the_end_of_each_step():
    engine, _ = build(small_experiment(GaussianSpec(), objective=Quoting(), optimizer=FAST))
    old = engine.policy.model.policy.mean.detach().clone()
    for number in (1, 2, 3):
        engine.step(number)
        old = 0.5 * old + 0.5 * engine.policy.model.policy.mean.detach()
        torch.testing.assert_close(engine.learner.state_dict()["old/mean"], old)
        assert not torch.equal(old, engine.policy.model.policy.mean)


def test_a_schedule_of_nothing_but_the_current_policy_is_no_lag_at_all():
    current = small_experiment(GaussianSpec(), objective=NftObjective(old_schedule="current"), optimizer=FAST)
    engine, _ = build(current)
    for number in (1, 2):
        engine.step(number)
        assert torch.equal(engine.learner.state_dict()["old/mean"], engine.policy.model.policy.mean)


def test_an_objective_without_an_old_policy_keeps_no_copy():
    engine, _ = build(small_experiment(GaussianSpec(), objective=MatchingObjective()))
    assert not any(name.startswith("old/") for name in engine.learner.state_dict())


@pytest.mark.parametrize(
    "policy", [PolicySpec(), PolicySpec(train="lora", rank=2, alpha=4, ema=0.9)], ids=["full", "lora"]
)
@pytest.mark.parametrize("stop_after", [2, 3])
def test_a_resumed_run_has_the_old_policy_bit_for_bit(tiny_spec, tmp_path, policy, stop_after):
    experiment = small_experiment(
        tiny_spec,
        objective=NftObjective(old_schedule="ramp"),
        rewards=(PaletteReward(),),
        optimizer=OptimizerSpec(learning_rate=0.003),
        policy=policy,
        evaluation=EvaluationSpec(every=4, images=1),
        checkpoint=CheckpointSpec(every=1),
    )
    whole, recorded, outcome = run(experiment, tmp_path / "whole")
    assert outcome == "finished"
    run(experiment, tmp_path / "parts", stop_after=stop_after)
    resumed, parts, outcome = run(experiment, tmp_path / "parts")
    assert outcome == "finished"
    assert_same_weights(whole, resumed)
    for mine, yours in zip(recorded.reports[-len(parts.reports) :], parts.reports, strict=True):
        assert_same_report(mine, yours)
    saved = [load_latest(tmp_path / name / "checkpoints") for name in ("whole", "parts")]
    assert saved[0].tensors.keys() == saved[1].tensors.keys()
    old = [name for name in saved[0].tensors if name.startswith("old/")]
    assert len(old) == len(whole.policy.weights.trained)
    assert all(torch.equal(saved[0].tensors[name], saved[1].tensors[name]) for name in saved[0].tensors)
    assert not all(torch.equal(saved[0].tensors[name], saved[0].tensors[f"policy/{name[4:]}"]) for name in old)


def test_a_copy_of_the_weights_is_active_inside_and_gone_outside_even_after_an_error():
    weight = torch.nn.Parameter(torch.tensor([1.0]))
    copy = WeightCopy({"w": weight}, lambda said: None)
    with torch.no_grad():
        weight.fill_(3.0)
    copy.approach(0.25)
    assert float(copy.values["w"]) == 2.5

    def fail_inside():
        with copy.active():
            assert float(weight.detach()) == 2.5
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert float(weight.detach()) == 3.0


# --- what an update leaves out, and what weighs how much --------------------------------------------------------------


def some_zero(how, plan):
    rollouts, credit, cond = sampled(how, plan)
    credit[::3] = 0
    return rollouts, credit, cond


@pytest.mark.parametrize("reduction", ["prompt", "rollout", "edge"])
def test_dropping_edges_without_credit_raises_the_weight_of_the_others(how, reduction):
    batch = some_zero(how, DETERMINISTIC)
    ((kept,),) = gradients(how, batch, MatchingObjective(), reduction=reduction, drop_zero_credit=True)
    rollouts, credit, cond = batch
    edges = noise_again(how, rollouts, StepNoise(0))
    sigma = how.sigmas[edges.level]
    velocity = how.model.velocity(edges.latents, sigma, cond.select(edges.prompt))
    target = (edges.latents - edges.next_latents) / sigma.view(-1, 1, 1, 1)
    error = (velocity - target).square().flatten(1).mean(dim=1)
    weights = edge_weights(edges, reduction, credit != 0)
    assert float(weights.sum()) == pytest.approx(1)
    assert not weights[credit == 0].any()
    (expected,) = torch.autograd.grad((weights.float() * credit * error).sum(), how.model.policy.mean)
    torch.testing.assert_close(kept, expected, atol=1e-6, rtol=1e-4)


def test_with_one_weight_for_all_dropping_is_a_matter_of_scale(how):
    batch = some_zero(how, plan_of(IndependentTree(), [3, 5], [[1, 1, 1, 0]] * 2))
    ((whole,),) = gradients(how, batch, reduction="edge")
    ((kept,),) = gradients(how, batch, reduction="edge", drop_zero_credit=True)
    total, left = len(batch[1]), int((batch[1] != 0).sum())
    torch.testing.assert_close(kept, whole * total / left, atol=1e-6, rtol=1e-4)


def test_dropped_edges_are_counted_and_cost_no_forward(how):
    batch = some_zero(how, plan_of(IndependentTree(), [3, 5], [[1, 1, 1, 0]] * 2))
    calls: list[int] = []
    counting = replace(how, velocity=lambda x, s, c: calls.append(len(x)) or how.velocity(x, s, c))
    metrics = learner(counting, drop_zero_credit=True).update(*batch, np.random.default_rng(0), StepNoise(0))
    assert metrics["updated_edges"] == sum(calls) == int((batch[1] != 0).sum()) == 16
    metrics = learner(how).update(*batch, np.random.default_rng(0), StepNoise(0))
    assert metrics["updated_edges"] == 24


@pytest.mark.parametrize("rollouts_per_update", [None, 2])
def test_without_any_credit_nothing_is_updated(how, rollouts_per_update):
    rollouts, credit, cond = sampled(how)
    trained = learner(how, drop_zero_credit=True, learning_rate=0.1, rollouts_per_update=rollouts_per_update)
    before = how.model.policy.mean.detach().clone()
    metrics = trained.update(rollouts, torch.zeros_like(credit), cond, np.random.default_rng(0), StepNoise(0))
    assert metrics == {"updated_edges": 0.0}
    assert trained.updates == 0
    assert torch.equal(how.model.policy.mean, before)


@pytest.mark.parametrize("objective", [MatchingObjective(), NftObjective(), PreferenceObjective(), ClippedObjective()])
def test_a_step_in_which_no_edge_is_trained_updates_nothing(how, objective):
    """Every chosen step comes before the only split."""
    plan = plan_of(BranchingTree(splits=(1,)), [2, 2], [[1, 0, 0, 0]] * 2)
    rollouts, _, cond = sampled(how, plan)
    trained = learner(how, objective, drop_zero_credit=True)
    learned = trained.update(rollouts, torch.zeros(0), cond, np.random.default_rng(0), StepNoise(0))
    assert plan.trained_edges == trained.updates == 0
    assert dict(learned) == {"updated_edges": 0.0}


def test_a_run_whose_rewards_all_tie_survives_dropping_what_has_no_credit(tiny_spec, tmp_path):
    class Same(PaletteReward):
        kind: Literal["same"] = "same"

        def score(self, images, prompts):
            return torch.ones(len(images))

    experiment = small_experiment(
        tiny_spec,
        rewards=(Same(),),
        optimizer=OptimizerSpec(drop_zero_credit=True),
        evaluation=EvaluationSpec(images=1),
    )
    engine, recorder = build(experiment)
    trackers = {tracker.kind: tracker.build(tmp_path) for tracker in (ConsoleTracker(), JsonlTracker())}
    assert run_loop(engine, tmp_path, {"recorder": recorder, **trackers}) == "finished"
    assert [report.metrics["updated_edges"] for report in recorder.reports] == [0.0] * 4


def test_reduction_edge_counts_every_edge_once_whatever_passes_through_it():
    plan = plan_of(BranchingTree(), [4, 6], [[1, 0, 1, 0], [1, 1, 1, 0]])
    how = execution(GaussianSpec().build(CPU), 4)
    rollouts, credit, cond = sampled(how, plan)
    edges = rollouts.edges
    weights = edge_weights(edges, "edge")
    assert torch.equal(weights, torch.full((len(edges),), 1 / len(edges), dtype=torch.float64))
    assert len(set(edge_weights(edges, "rollout").tolist())) > 1  # shared edges weigh more there
    ((found,),) = gradients(how, (rollouts, credit, cond), reduction="edge")
    one_by_one = [
        gradients(how, (rollouts, credit * (torch.arange(len(edges)) == row), cond), reduction="edge")[0][0]
        for row in range(len(edges))
    ]
    torch.testing.assert_close(found, torch.stack(one_by_one).sum(dim=0), atol=1e-6, rtol=1e-4)


def test_the_policy_that_sampled_is_kept_for_objectives_of_the_reverse_process_that_read_it(how):
    plan = plan_of(IndependentTree(), [3, 5], [[1, 1, 1, 0]] * 2)
    batch = sampled(replace(how, keep_velocity=True), plan)
    assert batch[0].edges.velocity is not None
    trained = learner(how, GuardedObjective(clip=0.5), learning_rate=0.01, inner_epochs=2)
    metrics = trained.update(*batch, np.random.default_rng(0), StepNoise(0))
    assert metrics["ratio_error"] == 0.0
    assert sampled(how, plan)[0].edges.velocity is None
    assert ClippedObjective().needs_old is False


def test_folders_of_forward_runs_resume_from_what_they_saved(tmp_path: Path):
    experiment = small_experiment(GaussianSpec(), objective=MatchingObjective(), optimizer=FAST)
    whole, _, _ = run(experiment, tmp_path / "whole")
    run(experiment, tmp_path / "parts", stop_after=2)
    resumed, _, _ = run(experiment, tmp_path / "parts")
    assert_same_weights(whole, resumed)
