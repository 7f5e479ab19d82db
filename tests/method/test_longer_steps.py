"""Steps that are joined: which forest is left, what it costs, and that it is the forest of the coarser schedule."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from worlds import GaussianSpec, execution, learner, plan_of, small_experiment

from aegpo.core import contracts
from aegpo.core.parts import SelectorSpec, TreeSpec
from aegpo.core.sections import RolloutsSpec, TailSpec
from aegpo.core.steps import ends, kinds, last_steps, passing
from aegpo.errors import PlanError
from aegpo.method.costs import cost
from aegpo.method.merging import with_merged
from aegpo.method.planning import made_up_signals, plan_step
from aegpo.method.planning import problems as plan_problems
from aegpo.method.residual_noise import noise_levels, residual_noise
from aegpo.method.samplers import CpsSampler, DanceSde, FlowSde, gaussian_log_prob
from aegpo.method.selectors import FirstSelector, FixedSelector, MergedSelector
from aegpo.method.tails import with_tail
from aegpo.method.trees import BranchingTree, IndependentTree, TrunkTree
from aegpo.prompts.lists import numbered
from aegpo.train.asking import Answers
from aegpo.train.engine import Engine
from aegpo.train.micro_batches import MicroBatch
from aegpo.train.noise import StepNoise
from aegpo.train.replay import Batch, schedule_std, transitions
from aegpo.train.rollouts import roll_out

SIX = RolloutsSpec(prompts_per_step=2, rollouts_per_step=8, denoising_steps=6)
TREES = [IndependentTree(), IndependentTree(start="shared"), BranchingTree(), BranchingTree(noise="all"), TrunkTree()]


def joined(plan, start: int, length: int):
    """The plan with a run of steps as one."""
    until = MergedSelector(start=start, length=length).merge(np.zeros((int(plan.group.max()) + 1, plan.num_steps)))
    return with_merged(plan, until)


@pytest.mark.parametrize("tree", TREES, ids=repr)
@pytest.mark.parametrize(("start", "length"), [(0, 2), (1, 3), (3, 3), (0, 6)])
def test_a_forest_with_joined_steps_is_a_forest_with_the_same_leaves_and_fewer_forwards(tree, start, length):
    counts, steps = np.array([6, 8]), np.array([[0, 1, 0, 1, 0, 0], [1, 1, 0, 0, 1, 0]], dtype=bool)
    plan = tree.plan(counts, steps, np.random.default_rng(0))
    found = joined(plan, start, length)
    contracts.check_plan(tree.kind, found, counts, steps)
    assert np.array_equal(found.group, plan.group)
    inside = range(start + 1, start + length)
    widths = [len(nodes) for nodes in plan.prompt]
    assert found.forwards == sum(width for level, width in enumerate(widths[:-1]) if level not in inside)
    assert [len(nodes) for nodes in found.prompt[: start + 1]] == widths[: start + 1]
    assert {len(nodes) for nodes in found.prompt[start + 1 : start + length + 1]} == {widths[start + length]}
    assert all(not found.noisy[level].any() and not found.trained[level].any() for level in inside)
    for leaf in range(plan.num_rollouts):
        before, after = _way(plan, leaf), _way(found, leaf)
        learned = [plan.trained[level][before[level + 1]] for level in range(start, start + length)]
        assert found.trained[start][after[start + 1]] == any(learned)


def _way(plan, leaf: int) -> list[int]:
    """The nodes of a rollout, level by level."""
    nodes = [leaf]
    for parent in reversed(plan.parent):
        nodes.append(int(parent[nodes[-1]]))
    return nodes[::-1]


@st.composite
def partitions(draw) -> np.ndarray:
    """(2, 6) ends of steps: each prompt's trajectory in runs of any lengths."""
    rows = []
    for _ in range(2):
        cuts = [*sorted(draw(st.sets(st.integers(1, 5)))), 6]
        rows.append([min(cut for cut in cuts if cut > level) for level in range(6)])
    return np.array(rows)


@given(until=partitions(), noise=st.sampled_from(["chosen", "all"]))
def test_whatever_is_joined_the_forest_keeps_its_contract_and_counts_what_it_evaluates(until, noise):
    counts, steps = np.array([5, 8]), np.array([[1, 0, 1, 0, 1, 0], [0, 1, 1, 0, 0, 0]], dtype=bool)
    plan = BranchingTree(noise=noise, split_noise=2).plan(counts, steps, np.random.default_rng(0))
    found = with_merged(plan, until)
    contracts.check_plan("branching", found, counts, steps)
    assert found.forwards == sum(int((~through).sum()) for through in passing(found))
    assert (
        sum(int((last * leaves).sum()) for last, leaves in zip(last_steps(found), found.leaves[1:], strict=True)) == 13
    )
    for leaf in range(13):
        loudest = [_along(each, each.scale, leaf)[_along(each, each.noisy, leaf)].max() for each in (plan, found)]
        assert loudest[0] == loudest[1]


def _along(plan, arrays, leaf: int) -> np.ndarray:  # (T,)
    """What T arrays (N_{i+1},) say of the edges of a rollout."""
    return np.array([level[node] for level, node in zip(arrays, _way(plan, leaf)[1:], strict=True)])


def test_steps_that_nothing_is_joined_to_leave_the_plan_as_it_is():
    plan = plan_of(BranchingTree(), [4, 6], [[1, 1, 0], [1, 0, 1]])
    assert with_merged(plan, np.array([[1, 2, 3]] * 2)) is plan
    assert kinds(plan).scale is None
    assert kinds(plan).until.tolist() == [1, 2, 3]


def test_the_different_steps_of_a_plan_are_each_there_once():
    plan = plan_of(BranchingTree(noise="all", split_noise=4), [4, 2], [[1, 0, 1, 0], [1, 0, 0, 0]])
    found = kinds(with_merged(plan, np.array([[1, 3, 3, 4], [1, 2, 3, 4]])))
    rows = list(zip(found.level.tolist(), found.until.tolist(), found.scale.tolist(), strict=True))
    assert rows == [(0, 1, 4.0), (1, 2, 1.0), (1, 3, 4.0), (2, 3, 1.0), (3, 4, 1.0)]
    assert [set(each.tolist()) for each in found.of] == [{0}, {1, 2}, {-1, 3}, {4}]


# --- in law, and bit for bit, one large step -------------------------------------------------------------------------


def coarse(start: int, length: int, steps: int = 6) -> list[int]:
    """The levels that are left."""
    return [level for level in range(steps + 1) if level not in range(start + 1, start + length)]


class OfLevels(StepNoise):
    """Noise of some levels of a schedule, for the coarser one that they make."""

    def __init__(self, levels: list[int]) -> None:
        super().__init__(0)
        self._of = levels

    def level(self, level: int, nodes, shape) -> torch.Tensor:
        return super().level(self._of[level], nodes, shape)


@pytest.mark.parametrize(
    "sampler", [FlowSde(), DanceSde(), CpsSampler(convention="gaussian")], ids=lambda part: part.kind
)
@pytest.mark.parametrize("start", [0, 1, 3])
@pytest.mark.parametrize("noise", ["chosen", "all"])
def test_a_run_that_is_joined_is_the_step_of_the_coarser_schedule_to_the_bit(sampler, start, noise):
    model = GaussianSpec(spread=0.5).build(torch.device("cpu"))
    how, cond = execution(model, 6, sampler), model.encode(numbered(["0.5", "-0.5"]))
    left = coarse(start, 2)
    chosen = [[int(level == start) for level in range(6)]] * 2
    merged = joined(plan_of(IndependentTree(noise=noise), [3, 5], chosen), start, 2)
    short = plan_of(IndependentTree(noise=noise), [3, 5], [[int(level == start) for level in left[:-1]]] * 2)
    found = roll_out(how, merged, cond, StepNoise(0))
    expected = roll_out(replace(how, sigmas=how.sigmas[left]), short, cond, OfLevels(left))
    assert torch.equal(found.latents, expected.latents)
    assert torch.equal(found.edges.latents, expected.edges.latents)
    assert torch.equal(found.edges.next_latents, expected.edges.next_latents)
    assert torch.equal(found.edges.log_prob, expected.edges.log_prob)
    assert found.edges.until.tolist() == [start + 2] * 8


def test_a_joined_last_step_paints_what_its_state_predicts_where_its_noise_is_left_out():
    how = replace(execution(GaussianSpec().build(torch.device("cpu")), 6), predicted_clean=True)
    cond, left = how.model.encode(numbered(["0.5", "-0.5"])), coarse(3, 3)
    merged = joined(plan_of(IndependentTree(), [3, 5], [[0, 1, 0, 1, 0, 0]] * 2), 3, 3)
    short = plan_of(IndependentTree(), [3, 5], [[0, 1, 0, 1]] * 2)
    found = roll_out(how, merged, cond, StepNoise(0))
    expected = roll_out(replace(how, sigmas=how.sigmas[left]), short, cond, OfLevels(left))
    assert torch.equal(found.latents, expected.latents)
    assert torch.equal(found.edges.next_latents, expected.edges.next_latents)
    noisy = roll_out(replace(how, predicted_clean=False), merged, cond, StepNoise(0))
    assert not torch.equal(found.latents, noisy.latents)


def test_a_joined_step_has_the_closed_forms_mean_and_std():
    """dx = (v + s^2 / (2 sigma) (x + (1 - sigma) v)) dsigma + s dw, in one Euler-Maruyama step from level 2 to 5."""
    level, sigma, sigma_next, count = 2, 4 / 6, 1 / 6, 4000
    model = GaussianSpec(spread=0.5).build(torch.device("cpu"))
    plan = joined(plan_of(IndependentTree(start="shared"), [count], [[0, 0, 1, 0, 0, 0]]), level, 3)
    how, cond = execution(model, 6, FlowSde(noise_level=0.7), micro_batch=count), model.encode(numbered(["0.5"]))
    edges = roll_out(how, plan, cond, StepNoise(0)).edges
    assert len(edges) == count
    x = edges.latents[0].double()
    slope = (sigma - (1 - sigma) * 0.25) / ((1 - sigma) ** 2 * 0.25 + sigma**2)  # E[noise - x0 | x] of N(0.5, 0.25 I)
    velocity = slope * (x - (1 - sigma) * 0.5) - 0.5
    rate, delta = 0.7 * (sigma / (1 - sigma)) ** 0.5, sigma - sigma_next
    mean = x - delta * (velocity + rate**2 / (2 * sigma) * (x + (1 - sigma) * velocity))
    std = rate * delta**0.5
    drawn = edges.next_latents.double()
    np.testing.assert_allclose(drawn.mean(dim=0), mean, atol=5 * std / count**0.5)
    np.testing.assert_allclose(drawn.std(dim=0), std, rtol=0.06)
    density = torch.distributions.Normal(mean, std).log_prob(drawn).mean(dim=(1, 2, 3))
    torch.testing.assert_close(edges.log_prob, density.float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("until", [[[1, 4, 4, 4, 5, 6]] * 2, [[2, 2, 3, 4, 6, 6], [1, 4, 4, 4, 5, 6]]])
@pytest.mark.parametrize("std_only", [False, True])
def test_before_the_first_update_every_ratio_of_joined_and_scaled_steps_is_exactly_one(storage, until, std_only):
    model = GaussianSpec().build(torch.device("cpu"))
    tree = BranchingTree(noise="all", split_noise=2)
    plan = with_merged(plan_of(tree, [4, 6], [[1, 1, 0, 0, 1, 0]] * 2), np.array(until))
    how = execution(model, 6, FlowSde(std_only=std_only), storage=storage)
    cond = model.encode(numbered(["0.5", "-0.5"]))
    rollouts = roll_out(how, plan, cond, StepNoise(0))
    edges = rollouts.edges
    with torch.no_grad():
        velocity = how.velocity(edges.latents.float(), how.sigmas[edges.level], cond.select(edges.prompt))
    levels = how.sigmas[edges.level], how.sigmas[edges.until]
    gaussian = how.sampler.transition(edges.latents.float(), velocity, *levels, edges.scale)
    assert torch.equal(gaussian_log_prob(gaussian, edges.next_latents.float()), edges.log_prob)
    credit = torch.linspace(-1, 1, len(edges))
    metrics = learner(how).update(rollouts, credit, cond, np.random.default_rng(0), StepNoise(0))
    assert metrics["ratio_error"] == 0.0
    assert metrics["grad_norm"] > 0


def test_objectives_see_the_span_of_a_joined_step_and_the_mean_std_of_the_steps_that_are_taken():
    how, credit = execution(GaussianSpec().build(torch.device("cpu")), 6), torch.ones(8)
    cond = how.model.encode(numbered(["0.5", "-0.5"]))
    merged = joined(plan_of(IndependentTree(noise="all"), [3, 5], [[0, 1, 0, 0, 0, 0]] * 2), 1, 3)
    rollouts = roll_out(how, merged, cond, StepNoise(0))
    std = schedule_std(how, merged)
    every = MicroBatch(torch.arange(8), torch.arange(8))
    update = transitions(how, Batch(rollouts.edges, credit, cond, every, std), Answers(how))
    torch.testing.assert_close(update.delta, torch.full((8,), 0.5))  # from level 1 to level 4 of 6
    assert update.level.tolist() == [1] * 8
    assert update.mean_std == std
    left = replace(how, sigmas=how.sigmas[coarse(1, 3)])
    assert std == pytest.approx(schedule_std(left, plan_of(IndependentTree(), [2], [[1] * 4])), rel=1e-6)


def test_the_mean_std_counts_a_wider_edge_as_often_as_rollouts_pass_through_it():
    how = execution(GaussianSpec().build(torch.device("cpu")), 4, DanceSde(eta=0.3))
    plan = plan_of(BranchingTree(noise="all", split_noise=3), [3, 2], [[1, 1, 0, 0]] * 2)
    one = 0.3 * 0.25**0.5
    widths = [[plan.scale[level][_way(plan, leaf)[level + 1]] for level in range(3)] for leaf in range(5)]
    assert schedule_std(how, plan) == pytest.approx(one * float(np.mean(widths)), rel=1e-6)
    assert float(np.mean(widths)) > 1


# --- what plans say of it --------------------------------------------------------------------------------------------


def test_noise_that_is_left_is_that_of_the_coarser_schedule():
    sigmas, sampler, left = np.linspace(1, 0, 7), FlowSde(), coarse(1, 3)
    merged = joined(plan_of(IndependentTree(), [2, 2], [[1, 1, 0, 0, 1, 0]] * 2), 1, 3)
    found = kinds(merged)
    table = sampler.table_between(sigmas[found.level], sigmas[found.until])
    short = plan_of(IndependentTree(), [2, 2], [[1, 1, 1, 0]] * 2)
    expected = noise_levels(short, sampler.table(sigmas[left]), sigmas[left])
    shown = noise_levels(merged, table, sigmas)
    for level, at in enumerate(left):
        np.testing.assert_array_equal(shown[at], expected[level])
    np.testing.assert_array_equal(shown[2], shown[4])  # what passes through has the noise of where it goes
    for clean in (False, True):
        one = residual_noise(merged, table, sigmas, predicted_clean=clean)
        assert one == residual_noise(short, sampler.table(sigmas[left]), sigmas[left], predicted_clean=clean)


def test_a_predicted_clean_image_leaves_out_the_noise_of_a_joined_last_step():
    changes = {"selector": MergedSelector(start=3, length=3), "rollouts": SIX.model_copy(update={"decode": "final"})}
    warned = list(plan_problems(small_experiment(GaussianSpec(), **changes)))
    assert [problem.warning for problem in warned] == [True]
    assert warned[0].message.startswith("the last step adds noise that nothing takes out again")
    found = {}
    for decode in ("final", "predicted-clean"):
        changes["rollouts"] = SIX.model_copy(update={"decode": decode})
        experiment = small_experiment(GaussianSpec(), **changes)
        found[decode] = Engine.build(experiment).step(1).metrics
    assert found["final"]["residual_noise"] > 0.1
    assert found["predicted-clean"]["residual_noise"] == 0
    assert found["final"]["forwards"] == found["predicted-clean"]["forwards"] == 8 * 4


def test_a_split_in_a_joined_last_step_is_refused_where_its_noise_is_left_out():
    rollouts = SIX.model_copy(update={"decode": "predicted-clean"})
    changes = {"selector": MergedSelector(start=3, length=3), "tree": IndependentTree(start="shared")}
    (problem,) = plan_problems(small_experiment(GaussianSpec(), rollouts=rollouts, **changes))
    assert problem.message.startswith("tree 'independent' splits at the last denoising step, whose noise 'decode: ")


@pytest.mark.parametrize("tree", [IndependentTree(), IndependentTree(start="shared"), TrunkTree()], ids=repr)
def test_a_run_with_joined_steps_costs_what_check_says(tree):
    experiment = small_experiment(GaussianSpec(), rollouts=SIX, tree=tree, selector=MergedSelector(start=2, length=3))
    plain = small_experiment(GaussianSpec(), rollouts=SIX, tree=tree, selector=FixedSelector(steps=(2,)))
    spent, whole = cost(experiment), cost(plain)
    assert whole.forwards.low - spent.forwards.low == 8 * 2  # levels 3 and 4 of 8 rollouts
    metrics = Engine.build(experiment).step(1).metrics
    assert metrics["forwards"] == spent.forwards.low == spent.forwards.high
    assert metrics["trained_edges"] == spent.trained_edges.low == 8
    assert metrics["ratio_error"] < 1e-5


def test_with_trunks_it_has_e_grpos_children_at_one_state_and_nothing_noisy_elsewhere():
    experiment = small_experiment(
        GaussianSpec(), rollouts=SIX, tree=TrunkTree(), selector=MergedSelector(start=2, length=3)
    )
    plan = plan_step(experiment, next(iter(made_up_signals(experiment))))
    assert [len(nodes) for nodes in plan.prompt] == [2, 2, 2, 8, 8, 8, 8]
    assert [int(noisy.sum()) for noisy in plan.noisy] == [0, 0, 8, 0, 0, 0]
    assert plan.forwards == 2 + 2 + 2 + 8


def test_a_trunk_that_is_known_ends_where_a_longer_step_begins():
    plan = plan_of(IndependentTree(start="shared"), [4, 4], [[0, 0, 0, 0, 1, 0]] * 2)
    assert plan.trunk_levels.tolist() == [5, 5]
    assert joined(plan, 1, 2).trunk_levels.tolist() == [2, 2]  # the step from level 1 leaves the probe's trajectory


def test_a_tail_begins_where_the_last_joined_noisy_step_ends():
    sigmas = np.linspace(1, 0, 13)
    plan = joined(plan_of(IndependentTree(), [3, 5], [[1, 0, 1] + [0] * 9] * 2), 2, 3)
    short = with_tail(plan, sigmas, TailSpec(solver="euler", ratio=0.5))
    assert short.tail.start == 5
    assert short.num_steps == 5 + 3  # int((12 - 4) 0.5) - 1
    assert short.forwards == 8 * (5 - 2 + 3)
    contracts.check_forest("'rollouts.tail'", short, np.array([3, 5]), 8)
    whole = with_tail(plan, sigmas, TailSpec(solver="euler", ratio=1))
    how = execution(GaussianSpec().build(torch.device("cpu")), 12)
    cond = how.model.encode(numbered(["0.5", "-0.5"]))
    one, other = (roll_out(how, each, cond, StepNoise(0)).latents for each in (plan, whole))
    assert torch.equal(one, other)


def test_a_tail_does_not_cut_another_prompts_longer_step():
    plan = plan_of(IndependentTree(), [2, 2], [[0, 1, 0, 0, 0, 0, 0, 0]] * 2)
    plan = with_merged(plan, np.array([[1, 3, 3, 4, 5, 6, 7, 8], [1, 2, 5, 5, 5, 6, 7, 8]]))
    short = with_tail(plan, np.linspace(1, 0, 9), TailSpec(solver="euler", ratio=0.9))
    assert (short.tail.start, len(short.tail.sigmas)) == (3, 5 + 2 + 1)
    contracts.check_forest("'rollouts.tail'", short, np.array([2, 2]), 7)


def test_a_solver_that_looks_back_is_refused_where_steps_are_joined():
    rollouts = SIX.model_copy(update={"tail": TailSpec()})
    changes = {"selector": MergedSelector(start=1, length=2), "rollouts": rollouts}
    (problem,) = plan_problems(small_experiment(GaussianSpec(), **changes))
    assert problem.location == ("rollouts", "tail")
    assert problem.message.startswith("'solver: dpm' looks back one step of the schedule, and this plan joins steps; ")
    euler = SIX.model_copy(update={"tail": TailSpec(solver="euler")})
    assert list(plan_problems(small_experiment(GaussianSpec(), **(changes | {"rollouts": euler})))) == []


class Leaping(TreeSpec):
    """Rollouts whose last two steps are one."""

    kind: str = "leaping"

    def plan(self, counts, steps, rng):
        plan = IndependentTree().plan(counts, steps, rng)
        until = ends(plan)
        return replace(plan, until=(*until[:-2], until[-1], until[-1]))


def test_trees_may_join_steps_but_not_those_that_a_selector_joins_too():
    rollouts = SIX.model_copy(update={"decode": "final"})
    experiment = small_experiment(GaussianSpec(), rollouts=rollouts, tree=Leaping(), selector=FirstSelector(top_k=3))
    assert Engine.build(experiment).step(1).metrics["forwards"] == cost(experiment).forwards.low == 8 * 5
    twice = small_experiment(GaussianSpec(), rollouts=rollouts, tree=Leaping(), selector=MergedSelector())
    (problem,) = plan_problems(twice)
    assert problem.location == ("selector",)
    assert problem.message.startswith("the tree has steps that end later than at the next level already")
    with pytest.raises(PlanError, match="choose another selector"):
        with_merged(joined(plan_of(IndependentTree(), [2], [[1] * 6]), 1, 2), np.array([[2, 2, 3, 4, 5, 6]]))


class Careless(SelectorSpec):
    """Joins a step to itself and the one before."""

    kind: str = "careless"
    until: tuple[int, ...]

    def select(self, signals, rng):
        selected = np.zeros((signals.num_prompts, signals.num_steps), dtype=np.bool_)
        selected[:, :2] = True
        return selected

    def merge(self, selected):
        return np.tile(np.array(self.until, dtype=np.int64), (len(selected), 1))


@pytest.mark.parametrize(
    ("until", "message"),
    [
        (
            (1, 2, 3),
            "selector 'careless' returned ends of steps of shape (2, 3), int64; a numpy array of (2, 4), int64 ",
        ),
        ((1, 1, 3, 4), "selector 'careless' ends denoising step 1 at level 1; a step ends at level 2 to 4"),
        ((1, 2, 3, 5), "selector 'careless' ends denoising step 3 at level 5; a step ends at level 4 to 4"),
        (
            (1, 4, 3, 4),
            "selector 'careless' ends step 1 at level 4, but step 2, which is inside it, at 3; all steps of",
        ),
        ((2, 2, 3, 4), "selector 'careless' chose step 1, which it joins to an earlier one; choose the first step of"),
    ],
)
def test_runs_that_are_none_are_blamed_on_the_selector(until, message):
    (problem,) = plan_problems(small_experiment(GaussianSpec(), selector=Careless(until=until)))
    assert problem.location == ("selector",)
    assert problem.message.startswith(message)
