"""Learning from executed plans: exact ratios, exact weights, and state that survives a restart."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_trees import questions, trees
from worlds import GaussianSpec, asked, execution, learner, plan_of, recorded_gradients

from aegpo.core.records import Edges, Scores, Update
from aegpo.core.sections import PolicySpec
from aegpo.errors import AegpoError, ContractError
from aegpo.method.advantages import GroupAdvantage
from aegpo.method.objectives import ClippedObjective
from aegpo.method.trees import BranchingTree, IndependentTree
from aegpo.models.adapters import add_adapters
from aegpo.train.edges import edge_weights
from aegpo.train.noise import StepNoise
from aegpo.train.rollouts import roll_out

PROMPTS = {"gaussian": ["0.5", "-0.5"], "tiny": ["a red circle", "two blue squares and a green triangle"]}
UNEQUAL = plan_of(IndependentTree(), [3, 5], [[1, 1, 1, 0], [1, 1, 1, 0]])
BRANCHED = plan_of(BranchingTree(), [4, 6], [[1, 0, 1, 0], [1, 1, 1, 0]])
NO_CHANGE = {"learning_rate": 1e-30, "weight_decay": 0.0, "max_grad_norm": None}  # gradients of one and the same policy
LORA = PolicySpec(train="lora", rank=2, alpha=4)


@pytest.fixture
def build(tiny_spec):
    """A fresh model each time, always with the same weights."""

    def build_one(which: str):
        return (GaussianSpec() if which == "gaussian" else tiny_spec).build(torch.device("cpu"))

    return build_one


def sampled(how, plan=UNEQUAL, seed: int = 0, which: str = "gaussian"):
    """Rollouts, their credit for brightness, and what the prompts encode to."""
    cond = how.model.encode(asked(PROMPTS[which]))
    rollouts = roll_out(how, plan, cond, StepNoise(seed))
    scores = rollouts.images.mean(dim=(1, 2, 3))[:, None]
    return rollouts, GroupAdvantage().estimate(Scores(scores), torch.ones(1), rollouts), cond


def gradients(how, batch, objective=None, **optimizer) -> list[list[torch.Tensor]]:
    """The gradient of each optimizer step of one update that changes nothing."""
    with recorded_gradients() as seen:
        learner(how, objective, **(NO_CHANGE | optimizer)).update(*batch, np.random.default_rng(0), StepNoise(0))
    return seen


def assert_all_close(ours, theirs, **tolerance):
    for mine, yours in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, yours, **tolerance)


@pytest.mark.parametrize("plan", [UNEQUAL, BRANCHED], ids=["independent", "branching"])
@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16])
def test_before_the_first_update_every_ratio_is_exactly_one(build, plan, storage):
    how = execution(build("gaussian"), 4, storage=storage)
    metrics = learner(how).update(*sampled(how, plan), np.random.default_rng(0), StepNoise(0))
    assert metrics["ratio_error"] == 0.0
    assert metrics["ratio"] == pytest.approx(1.0, abs=1e-6)
    assert metrics["approx_kl"] == metrics["clipped"] == 0.0


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16])
def test_a_network_replayed_in_batches_of_the_same_shape_has_ratios_of_exactly_one(build, storage):
    how = execution(build("tiny"), 4, storage=storage)
    batch = sampled(how, which="tiny")
    assert learner(how, micro_batch=8).update(*batch, np.random.default_rng(0), StepNoise(0))["ratio_error"] == 0.0


@pytest.mark.parametrize("micro_batch", [1, 3, 5, 64])
def test_a_network_replayed_in_other_batches_has_ratios_of_one_up_to_float32(build, micro_batch):
    how = execution(build("tiny"), 4)
    batch = sampled(how, which="tiny")
    error = learner(how, micro_batch=micro_batch).update(*batch, np.random.default_rng(0), StepNoise(0))["ratio_error"]
    assert error <= 2.4e-7  # two units in the last place of 1


@pytest.mark.parametrize("plan", [UNEQUAL, BRANCHED], ids=["independent", "branching"])
@pytest.mark.parametrize("which", ["gaussian", "tiny"])
def test_micro_batches_do_not_change_the_gradient(build, which, plan):
    how = execution(build(which), 4)
    batch = sampled(how, plan, which=which)
    (whole,) = gradients(how, batch, micro_batch=64)
    largest = max(float(gradient.abs().max()) for gradient in whole)
    for micro_batch in (1, 4):
        (parts,) = gradients(how, batch, micro_batch=micro_batch)
        assert_all_close(parts, whole, atol=1e-6 * max(1.0, largest), rtol=1e-4)


@pytest.mark.parametrize("reduction", ["prompt", "rollout"])
def test_the_gradient_is_that_of_the_weighted_sum_of_losses(build, reduction):
    how = execution(build("gaussian"), 4)
    rollouts, credit, cond = sampled(how, BRANCHED)
    (found,) = gradients(how, (rollouts, credit, cond), reduction=reduction, micro_batch=3)
    edges, mean = rollouts.edges, how.model.policy.mean
    sigma, sigma_next = how.sigmas[edges.level], how.sigmas[edges.level + 1]
    velocity = how.model.velocity(edges.latents, sigma, cond.select(edges.prompt))
    gaussian = how.sampler.transition(edges.latents, velocity, sigma, sigma_next)
    score = how.sampler.log_prob(gaussian, edges.next_latents)  # at ratio 1, d loss = -A d log-prob
    weights = edge_weights(edges, reduction).float()
    (expected,) = torch.autograd.grad(-(weights * credit * score).sum(), mean)
    torch.testing.assert_close(found[0], expected, atol=1e-6, rtol=1e-5)


def edges_of(plan) -> Edges:
    """The plan's trained edges without any latents."""
    rows = [np.flatnonzero(trained) for trained in plan.trained]
    columns = {"prompt": plan.prompt[1:], "rollout": plan.first_leaf[1:], "leaves": plan.leaves[1:]}
    picked = {
        name: torch.from_numpy(np.concatenate([array[row] for array, row in zip(arrays, rows, strict=True)]))
        for name, arrays in columns.items()
    }
    nothing = torch.zeros(0)
    return Edges(level=nothing, begin=nothing, end=nothing, states=nothing, log_prob=nothing, **picked)


@given(questions(), trees)
def test_weights_sum_to_one_and_count_every_prompt_the_same(question, tree):
    plan = tree.plan(*question, np.random.default_rng(0))
    edges = edges_of(plan)
    if len(edges.prompt) == 0:
        return
    by_prompt = edge_weights(edges, "prompt")
    assert float(by_prompt.sum()) == pytest.approx(1, abs=1e-12)
    shares = torch.bincount(edges.prompt, weights=by_prompt)
    with_edges = edges.prompt.unique()
    assert torch.allclose(shares[with_edges], torch.full((len(with_edges),), 1 / len(with_edges)).double())
    assert float(edge_weights(edges, "rollout").sum()) == pytest.approx(1, abs=1e-12)


@given(questions(), st.integers(0, 10), trees)
def test_reduction_rollout_counts_every_rollout_the_same_where_all_learn_from_as_many_steps(question, start, tree):
    counts, steps = question
    steps[:] = False
    steps[:, start % steps.shape[1]] = True
    steps[:, -1] = True
    plan = tree.plan(counts, steps, np.random.default_rng(0))
    edges = edges_of(plan)
    share = edge_weights(edges, "rollout") / edges.leaves  # of each rollout that passes through the edge
    totals, position = np.zeros(plan.num_rollouts), 0
    for level, trained in enumerate(plan.trained):
        below = np.arange(plan.num_rollouts)
        for deeper in reversed(range(level + 1, plan.num_steps)):
            below = plan.parent[deeper][below]
        for child in np.flatnonzero(trained):
            totals[below == child] += float(share[position])
            position += 1
    np.testing.assert_allclose(totals, 1 / plan.num_rollouts)


@pytest.mark.parametrize("which", ["gaussian", "tiny"])
@pytest.mark.parametrize("rollouts_per_update", [1, 5])
def test_partial_gradients_average_to_the_whole_gradient(build, which, rollouts_per_update):
    how = execution(build(which), 4)
    batch = sampled(how, BRANCHED, which=which)
    (whole,) = gradients(how, batch)
    parts = gradients(how, batch, rollouts_per_update=rollouts_per_update)
    assert len(parts) == 10 // rollouts_per_update
    averages = [torch.stack(gradient).mean(dim=0) for gradient in zip(*parts, strict=True)]
    largest = max(float(gradient.abs().max()) for gradient in whole)
    assert_all_close(averages, whole, atol=2e-6 * max(1.0, largest), rtol=1e-4)


def test_metrics_are_averaged_as_the_loss_is_whatever_the_number_of_updates(build):
    how = execution(build("gaussian"), 4)
    batch = sampled(how, BRANCHED)
    expected = float(-(edge_weights(batch[0].edges, "prompt") * batch[1]).sum())
    for optimizer in ({}, {"rollouts_per_update": 2}, {"inner_epochs": 3}, {"micro_batch": 3}):
        metrics = learner(how, **(NO_CHANGE | optimizer)).update(*batch, np.random.default_rng(0), StepNoise(0))
        assert metrics["loss"] == pytest.approx(expected, abs=1e-6)
        assert metrics["ratio"] == pytest.approx(1.0, abs=1e-6)


def test_inner_epochs_pass_over_everything_again_with_the_new_policy(build):
    how = execution(build("gaussian"), 4)
    batch = sampled(how)
    trained = learner(how, ClippedObjective(clip=1e-4), learning_rate=0.05, inner_epochs=3, rollouts_per_update=4)
    metrics = trained.update(*batch, np.random.default_rng(0), StepNoise(0))
    assert trained.updates == 3 * 2
    assert metrics["ratio_error"] == 0.0  # of the first optimizer step
    assert metrics["approx_kl"] > 0  # of all of them
    assert metrics["clipped"] > 0


def test_an_update_makes_what_was_credited_likelier(build):
    how = execution(build("gaussian"), 4)
    trained = learner(how, learning_rate=1e-3)
    before = float(how.model.policy.mean.detach().mean())
    for seed in range(5):
        trained.update(*sampled(how, seed=seed), np.random.default_rng(0), StepNoise(0))
    assert float(how.model.policy.mean.detach().mean()) > before + 1e-3  # brighter, which is what is rewarded


@pytest.mark.parametrize(("limit", "kept"), [(None, 1.0), (1e9, 1.0), (1e-3, None)])
def test_gradients_are_clipped_to_the_norm_and_their_own_norm_is_reported(build, limit, kept):
    how = execution(build("gaussian"), 4)
    batch = sampled(how)
    ((raw,),) = gradients(how, batch)
    with recorded_gradients() as seen:
        metrics = learner(how, **(NO_CHANGE | {"max_grad_norm": limit})).update(
            *batch, np.random.default_rng(0), StepNoise(0)
        )
    assert metrics["grad_norm"] == pytest.approx(float(raw.norm()), rel=1e-5)
    expected = float(raw.norm()) if kept else limit
    assert float(seen[0][0].norm()) == pytest.approx(expected, rel=1e-3)


def test_the_objective_sees_each_steps_std_and_the_schedules_mean(build):
    class Capturing:
        process, scope, needs_base, needs_old, keeps_old = "reverse", "rows", False, False, False

        def __init__(self):
            self.seen: list[Update] = []

        def loss(self, update: Update):
            self.seen.append(update)
            return ClippedObjective().loss(update)

    how, objective = execution(build("gaussian"), 4), Capturing()
    learner(how, objective).update(*sampled(how), np.random.default_rng(0), StepNoise(0))
    (update,) = objective.seen
    nothing = torch.zeros(4, 1, 1, 1)
    schedule = how.sampler.transition(nothing, nothing, how.sigmas[:-1], how.sigmas[1:]).std
    torch.testing.assert_close(update.std, schedule[update.level])
    assert update.mean_std == pytest.approx(float(schedule[:-1].mean()), abs=1e-6)
    assert update.base_mean is None


def test_averaged_weights_follow_the_decay_and_its_warm_up(build):
    how = execution(build("gaussian"), 4)
    trained = learner(how, policy=PolicySpec(ema=0.5), learning_rate=0.1)
    mean = how.model.policy.mean
    expected = mean.detach().clone()
    for number in range(1, 13):
        trained.update(*sampled(how, seed=number), np.random.default_rng(0), StepNoise(0))
        decay = min(0.5, (1 + number) / (10 + number))
        expected = decay * expected + (1 - decay) * mean.detach()
        torch.testing.assert_close(trained.weights.average.values["mean"], expected)
    current = mean.detach().clone()

    def fail_inside():
        with trained.weights.active(trained.weights.average):
            assert torch.equal(mean, trained.weights.average.values["mean"])
            assert not torch.equal(mean, current)
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert torch.equal(mean, current)


def test_without_averages_the_policy_is_its_own_average(build):
    how = execution(build("gaussian"), 4)
    trained = learner(how, learning_rate=0.1)
    trained.update(*sampled(how), np.random.default_rng(0), StepNoise(0))
    current = how.model.policy.mean.detach().clone()
    with trained.weights.active(trained.weights.average):
        assert torch.equal(how.model.policy.mean, current)


def outputs(model) -> torch.Tensor:
    """Velocities of two prompts at two noise levels, from fixed noise."""
    latents = torch.randn((2, *model.latent_shape), generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        return model.velocity(latents, torch.tensor([0.9, 0.4]), model.encode(asked(PROMPTS["tiny"])))


@pytest.mark.parametrize("policy", [PolicySpec(), LORA], ids=["full", "lora"])
def test_training_moves_the_policy_and_never_the_base(build, policy):
    pristine = outputs(build("tiny"))
    how = execution(build("tiny"), 4)
    trained = learner(how, policy=policy, learning_rate=0.01)
    assert torch.equal(outputs(how.model), pristine)  # adapters begin at zero
    for seed in range(2):
        trained.update(*sampled(how, seed=seed, which="tiny"), np.random.default_rng(0), StepNoise(0))
    assert not torch.equal(outputs(how.model), pristine)
    with how.model.frozen("base"):
        assert torch.equal(outputs(how.model), pristine)
    assert not torch.equal(outputs(how.model), pristine)


def test_full_fine_tuning_trains_every_weight(build):
    how = execution(build("tiny"), 4)
    assert set(learner(how).weights.trained) == {name for name, _ in how.model.policy.named_parameters()}


def test_lora_trains_its_adapters_and_nothing_else(build):
    how = execution(build("tiny"), 4)
    trained = learner(how, policy=LORA, learning_rate=0.01)
    before = copy.deepcopy(how.model.policy.state_dict())
    assert trained.weights.trained
    assert all("lora_" in name for name in trained.weights.trained)
    for seed in range(2):
        trained.update(*sampled(how, seed=seed, which="tiny"), np.random.default_rng(0), StepNoise(0))
    after = how.model.policy.state_dict()
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert moved <= set(trained.weights.trained)
    assert len(moved) > 0.8 * len(trained.weights.trained)  # the text side of the last layer reaches no pixel


def test_targets_that_match_nothing_are_refused_with_what_there_is(build):
    policy = build("tiny").policy
    with pytest.raises(AegpoError) as error:
        add_adapters(policy, PolicySpec(train="lora", targets=("q_proj", "v_proj")))
    assert str(error.value) == (
        "policy: no module of SD3Transformer2DModel matches 'targets' q_proj, v_proj; its linear layers end in "
        "add_k_proj, add_q_proj, add_v_proj, context_embedder, linear, linear_1, linear_2, net.2, proj, proj_out, "
        "to_add_out, to_k, to_out.0, to_q, to_v"
    )


@pytest.mark.parametrize(
    ("targets", "told"),
    [
        (("to_q", "to_kk"), "matches 'targets' to_kk; did you mean 'to_k'? its linear layers end in add_k_proj, "),
        (("to_q", "o_k"), "matches 'targets' o_k; did you mean 'to_k'? "),  # the end of a name, but not of a part
        (("to_q", ""), "matches 'targets' ; its linear layers end in "),
        (("to_q", "attn"), "'targets' to_q, attn name a module that LoRA cannot adapt, for it is no single layer; its"),
    ],
)
def test_each_target_is_of_a_layer_or_refused(build, targets, told):
    with pytest.raises(AegpoError) as error:
        add_adapters(build("tiny").policy, PolicySpec(train="lora", targets=targets))
    assert told in str(error.value)


def test_of_a_models_own_list_of_targets_some_is_enough(build):
    policy = build("tiny").policy
    add_adapters(policy, PolicySpec(train="lora", rank=2), ("to_q", "of_another_network"))
    adapted = {name.split(".lora_")[0] for name, _ in policy.named_parameters() if "lora_" in name}
    assert adapted
    assert all(name.endswith("to_q") for name in adapted)


@pytest.mark.parametrize("policy", [PolicySpec(), LORA], ids=["full", "lora"])
def test_a_kl_penalty_pulls_towards_the_base(build, policy):
    how = execution(build("tiny"), 4)
    trained = learner(how, ClippedObjective(beta=10.0), policy, learning_rate=0.003)
    rollouts, credit, cond = sampled(how, which="tiny")
    first = trained.update(rollouts, credit, cond, np.random.default_rng(0), StepNoise(0))
    assert first["kl"] == pytest.approx(0.0, abs=1e-12)
    moved = trained.update(rollouts, torch.zeros_like(credit), cond, np.random.default_rng(0), StepNoise(0))
    assert moved["kl"] > 0
    assert moved["grad_norm"] > 0
    assert all(weight.requires_grad for weight in trained.weights.trained.values())
    kls = [
        trained.update(rollouts, torch.zeros_like(credit), cond, np.random.default_rng(0), StepNoise(0))["kl"]
        for _ in range(25)
    ]
    assert min(kls) < 0.5 * max(kls)


@pytest.mark.parametrize("policy", [PolicySpec(), LORA], ids=["full", "lora"])
def test_the_gradient_of_the_kl_is_not_lost_while_the_base_is_asked(build, policy):
    how = execution(build("tiny"), 4)
    trained = learner(how, ClippedObjective(beta=1.0), policy, learning_rate=0.01, max_grad_norm=None)
    rollouts, credit, cond = sampled(how, which="tiny")
    trained.update(rollouts, credit, cond, np.random.default_rng(0), StepNoise(0))
    edges = rollouts.edges
    sigma, sigma_next, prompts = how.sigmas[edges.level], how.sigmas[edges.level + 1], cond.select(edges.prompt)
    with torch.no_grad(), how.model.frozen("base"):
        base = how.sampler.transition(edges.latents, how.velocity(edges.latents, sigma, prompts), sigma, sigma_next)
    mine = how.sampler.transition(edges.latents, how.velocity(edges.latents, sigma, prompts), sigma, sigma_next)
    kl = (mine.mean - base.mean).square().flatten(1).mean(dim=1) / (2 * mine.std.square())
    loss = (edge_weights(edges, "prompt").float() * kl).sum()
    weights = list(trained.weights.trained.values())
    expected = torch.autograd.grad(loss, weights, allow_unused=True)
    with recorded_gradients() as seen:
        trained.update(rollouts, torch.zeros_like(credit), cond, np.random.default_rng(0), StepNoise(0))
    for found, wanted in zip(seen[0], expected, strict=True):
        torch.testing.assert_close(found, torch.zeros_like(found) if wanted is None else wanted, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize(
    "policy", [PolicySpec(), PolicySpec(ema=0.9), LORA.model_copy(update={"ema": 0.9})], ids=["full", "ema", "lora-ema"]
)
def test_a_restored_learner_takes_the_next_step_bit_for_bit(build, policy):
    how = execution(build("tiny"), 4)
    original = learner(how, policy=policy, learning_rate=0.01)
    for seed in range(2):
        original.update(*sampled(how, seed=seed, which="tiny"), np.random.default_rng(seed), StepNoise(seed))
    state = {name: tensor.clone() for name, tensor in original.state_dict().items()}
    again = execution(build("tiny"), 4)
    restored = learner(again, policy=policy, learning_rate=0.01)
    restored.load_state_dict(state, original.updates)
    for name, tensor in restored.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert set(restored.state_dict()) == set(state)
    mine = original.update(*sampled(how, seed=2, which="tiny"), np.random.default_rng(2), StepNoise(2))
    yours = restored.update(*sampled(again, seed=2, which="tiny"), np.random.default_rng(2), StepNoise(2))
    assert mine == yours
    for name, tensor in restored.state_dict().items():
        assert torch.equal(tensor, original.state_dict()[name]), name


def test_a_loss_that_is_not_finite_is_the_objectives_fault_and_changes_nothing(build):
    how = execution(build("gaussian"), 4)
    rollouts, credit, cond = sampled(how)
    trained = learner(how)
    credit[3] = torch.nan
    with pytest.raises(ContractError, match="objective 'tried' returned a loss that is not finite"):
        trained.update(rollouts, credit, cond, np.random.default_rng(0), StepNoise(0))
    assert torch.equal(how.model.policy.mean, torch.zeros_like(how.model.policy.mean))
    assert trained.updates == 0


def test_a_policy_that_is_no_longer_finite_is_called_diverged(build):
    how = execution(build("gaussian"), 4)
    rollouts, credit, cond = sampled(how)
    trained = learner(how)
    with torch.no_grad():
        how.model.policy.mean.fill_(torch.nan)
    with pytest.raises(AegpoError) as error:
        trained.update(rollouts, credit, cond, np.random.default_rng(0), StepNoise(0))
    assert str(error.value) == (
        "training diverged: the policy's outputs or gradients are not finite; lower 'optimizer.learning_rate', or "
        "raise 'sampler.noise_level', and start over with --fresh"
    )
    assert trained.updates == 0


def test_a_gradient_that_is_not_finite_is_called_diverged_before_it_touches_the_weights(build):
    how = execution(build("gaussian"), 4)
    rollouts, credit, cond = sampled(how)
    trained = learner(how)
    how.model.policy.mean.register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(AegpoError, match="training diverged"):
        trained.update(rollouts, credit, cond, np.random.default_rng(0), StepNoise(0))
    assert torch.equal(how.model.policy.mean, torch.zeros_like(how.model.policy.mean))


def test_tree_edges_weigh_what_the_same_steps_of_independent_rollouts_would():
    """16 and 8 leaves by splits at steps 0..3: each step has the same total weight, and so has each prompt."""
    steps = np.zeros((2, 6), dtype=bool)
    steps[:, :4] = True
    plan = BranchingTree().plan(np.array([16, 8]), steps, np.random.default_rng(0))
    levels = [np.flatnonzero(trained) for trained in plan.trained]
    index = torch.cat([torch.full((len(rows),), level) for level, rows in enumerate(levels)])
    prompt = torch.cat([torch.from_numpy(plan.prompt[level + 1][rows]) for level, rows in enumerate(levels)])
    leaves = torch.cat([torch.from_numpy(plan.leaves[level + 1][rows]) for level, rows in enumerate(levels)])
    nothing = torch.zeros(len(index), 1, 1, 1)
    edges = Edges(index, prompt, prompt, leaves, index, index, nothing, nothing.flatten())
    share = edge_weights(edges, "prompt")
    assert torch.allclose(torch.bincount(prompt, weights=share), torch.tensor([0.5, 0.5], dtype=torch.float64))
    assert torch.allclose(torch.bincount(index, weights=share), torch.full((4,), 0.25, dtype=torch.float64))
    by_rollout = torch.bincount(prompt, weights=edge_weights(edges, "rollout"))
    assert torch.allclose(by_rollout, torch.tensor([16 / 24, 8 / 24], dtype=torch.float64))
