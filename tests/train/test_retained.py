"""Nothing goes through the network twice: siblings share an evaluation, and what sampling computed is learned from."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from test_learning import NO_CHANGE, PROMPTS, assert_all_close, build  # noqa: F401 - a fixture
from torch import Tensor
from torch.overrides import TorchFunctionMode
from worlds import asked, execution, learner, plan_of, recorded_gradients, small_experiment

from aegpo.core.processes import Place
from aegpo.core.records import Scores
from aegpo.core.sections import OptimizerSpec, PolicySpec, RolloutsSpec
from aegpo.method.advantages import GroupAdvantage
from aegpo.method.allocators import RandomAllocator
from aegpo.method.dealing import deal, expected_gradient_rows, gradient_rows, worth_keeping
from aegpo.method.objectives import ClippedObjective
from aegpo.method.partition import Partition
from aegpo.method.selectors import RandomSelector
from aegpo.method.trained_edges import TrainedEdges
from aegpo.method.trees import BranchingTree, IndependentTree, TrunkTree
from aegpo.models.adapters import add_adapters
from aegpo.parallel.team import Team
from aegpo.train import retained
from aegpo.train.engine import Engine
from aegpo.train.noise import StepNoise
from aegpo.train.retained import Retention, Room, saved_bytes, to_keep
from aegpo.train.rollouts import roll_out
from aegpo.train.sampled import Sample, Sampled

PLANS = {
    "independent": plan_of(IndependentTree(), [3, 5], [[1, 1, 1, 0], [1, 0, 1, 0]]),
    "branching": plan_of(BranchingTree(), [4, 6], [[1, 0, 1, 0], [1, 1, 1, 0]]),
    "trunk": plan_of(TrunkTree(), [6, 6], [[1, 1, 1, 0]] * 2),
    "all noisy": plan_of(BranchingTree(noise="all"), [4, 6], [[1, 0, 1, 0], [1, 1, 0, 0]]),
}
every_plan = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
LORA = PolicySpec(train="lora", rank=2, alpha=4)


def counted(how):
    """The same, and the rows that go through the network without and with a gradient."""
    rows: Counter[bool] = Counter()

    def velocity(latents, sigma, cond):
        rows[torch.is_grad_enabled()] += len(latents)
        return how.velocity(latents, sigma, cond)

    return replace(how, velocity=velocity), rows


def keeping(how, plan, members, gib: float = 1.0, most: int = 64) -> Retention:
    """What sampling keeps of a plan for an update of some rollouts."""
    room = Room(how.model.policy, torch.device("cpu"), gib, Place())
    room.refill()
    return Retention(room, to_keep(plan, members), most)


def learned(how, plan, *, gib: float | None = 1.0, objective=None, change: bool = False, **optimizer):
    """Gradients of each update of one step, and its metrics; `gib`: None retains nothing."""
    cond = how.model.encode(asked(PROMPTS["tiny"]))
    taught = learner(how, objective, **(({} if change else NO_CHANGE) | optimizer))
    deals = taught.deals(plan, np.random.default_rng(5))
    retention = None if gib is None else keeping(how, plan, deals[0][0], gib, optimizer.get("micro_batch", 64))
    rollouts = roll_out(how, plan, cond, StepNoise(0), retention=retention)
    scores = Scores(rollouts.images.mean(dim=(1, 2, 3))[:, None])
    credit = GroupAdvantage().estimate(scores, torch.ones(1), rollouts)
    kept = None if retention is None else [retention.batches]
    sampled = Sampled(Partition.of(plan, 1), [rollouts], rollouts, scores, kept)
    with recorded_gradients() as seen:
        metrics = dict(taught.update(sampled, credit, cond, deals, StepNoise(0)))
    return seen, metrics


# --- siblings --------------------------------------------------------------------------------------------------------


@every_plan
def test_states_are_there_once_and_numbered_where_edges_begin_first(plan):
    known = TrainedEdges.of(plan)
    assert (np.diff(known.begin) >= 0).all()
    assert set(known.begin.tolist()) == set(range(known.begins))
    assert set(known.begin.tolist()) | set(known.end.tolist()) == set(range(known.states))
    nodes = {(level, int(node)) for level, trained in enumerate(plan.trained) for node in plan.parent[level][trained]}
    assert known.begins == len(nodes)


@every_plan
@pytest.mark.parametrize("deal_by", ["rollouts", "prompts"])
def test_siblings_of_one_update_go_through_the_network_once(build, plan, deal_by):  # noqa: F811
    how, rows = counted(execution(build("tiny"), 4, micro_batch=8))
    spec = OptimizerSpec(rollouts_per_update=5, deal=deal_by)
    seen, _ = learned(how, plan, gib=None, rollouts_per_update=5, deal=deal_by)
    parts = deal(plan.group, spec, np.random.default_rng(5))
    assert rows[True] == gradient_rows(plan, parts) <= plan.trained_edges
    assert rows[False] == plan.forwards
    assert len(seen) == len(parts) > 1


@pytest.mark.parametrize("size", [3, 5, 10, None])
@every_plan
def test_the_expected_rows_are_the_mean_over_deals(plan, size):
    spec = OptimizerSpec(rollouts_per_update=size)
    rng = np.random.default_rng(0)
    drawn = [gradient_rows(plan, deal(plan.group, spec, rng)) for _ in range(2000)]
    assert expected_gradient_rows(plan, spec) == pytest.approx(np.mean(drawn), abs=0.12)
    whole = OptimizerSpec(rollouts_per_update=size, deal="prompts")
    assert expected_gradient_rows(plan, whole) == gradient_rows(plan, deal(plan.group, whole, rng))


# --- graphs that are kept --------------------------------------------------------------------------------------------


@every_plan
@pytest.mark.parametrize("policy", ["full", "lora"])
@pytest.mark.parametrize("optimizer", [{}, {"rollouts_per_update": 5}, {"inner_epochs": 2}, {"micro_batch": 3}])
def test_what_is_retained_has_the_gradient_of_what_is_evaluated_again(build, plan, policy, optimizer):  # noqa: F811
    found = []
    for gib in (None, 1.0):
        model = build("tiny")
        if policy == "lora":
            torch.manual_seed(0)
            add_adapters(model.policy, LORA)
        how, rows = counted(execution(model, 4, micro_batch=8))
        gradients, metrics = learned(how, plan, gib=gib, **optimizer)
        found.append((gradients, metrics, sum(rows.values())))
    (again, metrics, dear), (kept, same, cheap) = found
    largest = max(float(gradient.abs().max()) for step in again for gradient in step)
    for one, other in zip(kept, again, strict=True):
        assert_all_close(one, other, atol=1e-6 * max(1.0, largest), rtol=1e-4)
    assert same["ratio_error"] == 0.0  # it is the very number that was sampled with
    assert metrics["loss"] == pytest.approx(same["loss"], abs=1e-5)
    first = deal(plan.group, OptimizerSpec(**optimizer), np.random.default_rng(5))[:1]
    assert dear - cheap == gradient_rows(plan, first)


def test_it_is_bit_equal_to_evaluating_again_where_the_batches_are(build):  # noqa: F811
    """One trained level: sampling, which asks about all of it at once, has the batch that the update has."""
    plan = plan_of(IndependentTree(noise="all"), [3, 5], [[0, 1, 0, 0]] * 2)
    how = execution(build("tiny"), 4, micro_batch=8)
    (again,), before = learned(how, plan, gib=None)
    (kept,), after = learned(how, plan)
    assert all(torch.equal(*pair) for pair in zip(again, kept, strict=True))
    assert before == after


@every_plan
def test_how_much_memory_there_is_changes_no_bit(build, plan):  # noqa: F811
    def moved(gib: float) -> tuple[list[Tensor], dict[str, float], int]:
        how, rows = counted(execution(build("tiny"), 4, micro_batch=8))
        _, metrics = learned(how, plan, gib=gib, change=True, learning_rate=0.01, micro_batch=3, rollouts_per_update=5)
        return [weight.detach() for weight in how.model.policy.parameters()], metrics, sum(rows.values())

    all_kept, metrics, least = moved(1.0)
    _, each = saved_bytes_of(build("tiny"))
    for gib in (1e-9, 2.5 * each / 2**30):  # not even one batch; some
        weights, same, spent = moved(gib)
        assert all(torch.equal(*pair) for pair in zip(weights, all_kept, strict=True))
        assert same == metrics
        assert spent > least


@every_plan
@pytest.mark.parametrize(("after", "learning"), [(0, True), (2, True), (1, False)])
def test_where_memory_ends_amid_sampling_the_same_is_evaluated_again(build, plan, after, learning):  # noqa: F811
    def moved(gib, left: float) -> tuple[list[Tensor], dict[str, float]]:
        how = execution(build("tiny"), 4, micro_batch=8)
        sampling = [True]

        def velocity(latents, sigma, cond):
            nonlocal left
            if torch.is_grad_enabled() == learning and sampling[0]:
                left -= 1
                if left < 0:
                    sampling[0] = False
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return how.velocity(latents, sigma, cond)

        starved = replace(how, velocity=velocity)
        _, metrics = learned(
            starved, plan, gib=gib, change=True, learning_rate=0.01, micro_batch=3, rollouts_per_update=5
        )
        assert (left < 0) == (gib == "auto")
        return [weight.detach() for weight in how.model.policy.parameters()], metrics

    weights, metrics = moved("auto", after)
    again, same = moved(1e-9, float("inf"))
    assert all(torch.equal(*pair) for pair in zip(weights, again, strict=True))
    assert metrics == same
    if after:
        return
    with pytest.raises(torch.OutOfMemoryError):
        moved(1.0, 0)  # the user's own limit


@every_plan
@pytest.mark.parametrize("shards", [1, 2])
def test_where_memory_ends_amid_an_update_it_learns_the_same_without_the_graphs(build, plan, shards):  # noqa: F811
    def moved(retain, after: float) -> tuple[list[Tensor], dict[str, float]]:
        how = execution(build("tiny"), 4, micro_batch=8)
        team, cond = Team.alone(shards), how.model.encode(asked(PROMPTS["tiny"]))
        taught = learner(how, retain=retain, learning_rate=0.01, micro_batch=3, rollouts_per_update=5, team=team)
        partition, deals = Partition.of(plan, shards), taught.deals(plan, np.random.default_rng(5))
        retentions = list(map(taught.keeping(partition, deals), partition.parts))
        parts = [
            roll_out(how, part, cond, StepNoise(0), retention=retention)
            for part, retention in zip(partition.parts, retentions, strict=True)
        ]
        retained = [batch for retention in retentions for batch in retention.batches]
        assert all(batch.velocity is not None for batch in retained) == (retain == "auto")
        samples = [
            Sample(part, Scores(part.images.mean(dim=(1, 2, 3))[:, None]), retention.batches)
            for part, retention in zip(parts, retentions, strict=True)
        ]
        sampled = Sampled.of(team, partition, samples, retaining=True)
        credit = GroupAdvantage().estimate(sampled.scores, torch.ones(1), sampled.whole)
        left = after

        def graph_freed(gradient):
            nonlocal left
            left -= 1
            if left == 0:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

        handle = next(iter(taught.weights.trained.values())).register_hook(graph_freed)
        try:
            metrics = dict(taught.update(sampled, credit, cond, deals, StepNoise(0)))
        finally:
            handle.remove()
        assert left <= 0 or after == float("inf")
        assert all(batch.velocity is None for batch in retained) == (after <= 2 or retain != "auto")
        return [weight.detach() for weight in how.model.policy.parameters()], metrics

    weights, metrics = moved(1e-9, float("inf"))
    for after in (1, 2, float("inf")):  # in the first batch, in the second with gradients of the first, never
        again, same = moved("auto", after)
        assert all(torch.equal(*pair) for pair in zip(weights, again, strict=True))
        assert metrics == same
    with pytest.raises(torch.OutOfMemoryError):
        moved(1e-9, 1)  # the user's own limit


def test_after_a_shortage_half_as_much_is_kept_in_the_steps_that_follow(build):  # noqa: F811
    room, tried = Room(build("tiny").policy, torch.device("cpu"), "auto", Place()), []

    def once() -> int:
        tried.append(room._left)
        if len(tried) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return 7

    with patch.object(retained, "free_bytes", lambda device: 1000):
        room.refill()
        with pytest.raises(torch.OutOfMemoryError):
            room.spared(once)  # nobody keeps anything that could be dropped
        tried.clear()
        Retention(room, (), 1)
        assert room.spared(once) == 7
        assert tried == [500, 0]
        room.refill()
        assert room._left == 250


def saved_bytes_of(model) -> tuple[Tensor, float]:
    """What the network says of three latents, and what one of them leaves behind."""
    cond = model.encode(asked(PROMPTS["tiny"]))
    sigma, rows = torch.full((3,), 0.5), torch.tensor([0, 1, 0])
    velocity, taken = saved_bytes(
        model.policy, lambda: model.velocity(torch.ones(3, 3, 24, 24), sigma, cond.select(rows))
    )
    return velocity, taken / 3


def test_a_graph_is_as_large_as_what_it_saves_beside_the_weights(build):  # noqa: F811
    velocity, each = saved_bytes_of(build("tiny"))
    assert velocity.requires_grad
    weights = sum(weight.nbytes for weight in build("tiny").policy.parameters())
    assert 10 * 3 * 24 * 24 * 4 < each < 100 * weights
    velocity.sum().backward()


def test_with_gradient_checkpointing_only_inputs_of_blocks_are_kept(build):  # noqa: F811
    model, plan = build("tiny"), PLANS["branching"]
    _, whole = saved_bytes_of(model)
    (without,), _ = learned(execution(model, 4, micro_batch=8), plan)
    model = build("tiny")
    model.policy.enable_gradient_checkpointing()
    _, little = saved_bytes_of(model)
    assert little < 0.5 * whole
    (checkpointed,), metrics = learned(execution(model, 4, micro_batch=8), plan)
    assert_all_close(checkpointed, without, atol=1e-6, rtol=1e-4)
    assert metrics["ratio_error"] == 0.0


def test_a_few_states_among_many_are_evaluated_again_with_others(build):  # noqa: F811
    """A trunk's single state beside the many of its children: alone it would cost what it saves."""
    plan = plan_of(TrunkTree(), [6, 6], [[1, 1, 1, 0]] * 2)
    how, rows = counted(execution(build("tiny"), 4, micro_batch=64))
    learned(how, plan)
    assert rows == {False: plan.forwards, True: TrainedEdges.of(plan).begins}  # as if nothing were retained


def test_edges_without_credit_are_left_out_of_what_was_retained(build):  # noqa: F811
    how, plan = execution(build("tiny"), 4, micro_batch=8), PLANS["independent"]
    (again,), before = learned(how, plan, gib=None, drop_zero_credit=True)
    (kept,), after = learned(how, plan, drop_zero_credit=True)
    assert_all_close(kept, again, atol=1e-6, rtol=1e-4)
    assert before["updated_edges"] == after["updated_edges"]


def test_the_base_is_asked_once_a_state_in_one_phase(build):  # noqa: F811
    model, plan = build("tiny"), PLANS["branching"]
    entered = []
    frozen = model.frozen

    @contextmanager
    def noted(name):
        entered.append(name)
        with frozen(name):
            yield

    model.frozen = noted
    how, rows = counted(execution(model, 4, micro_batch=8))
    learned(how, plan, objective=ClippedObjective(beta=0.1), rollouts_per_update=5, inner_epochs=2, micro_batch=2)
    assert entered == ["base", "base"]  # when it becomes the base, and then for all updates
    assert rows[False] == plan.forwards - sum(map(int, _first_states(plan))) + TrainedEdges.of(plan).begins


def _first_states(plan):
    first = deal(plan.group, OptimizerSpec(rollouts_per_update=5), np.random.default_rng(5))[0]
    return [chosen.sum() for chosen in to_keep(plan, first)]


# --- in an engine ----------------------------------------------------------------------------------------------------


def trees(model, **optimizer):
    parts = {"tree": BranchingTree(), "selector": RandomSelector(top_k=2), "allocator": RandomAllocator(low=2, high=6)}
    parts["rollouts"] = RolloutsSpec(prompts_per_step=2, rollouts_per_step=8, denoising_steps=4, micro_batch=4)
    return Engine.build(small_experiment(model, optimizer=OptimizerSpec(learning_rate=1e-3, **optimizer), **parts))


@pytest.mark.parametrize("setting", ["auto", 2.0])
def test_a_training_step_retains_as_it_was_told(tiny_spec, setting):
    steps = {}
    for retain in ("never", setting):
        engine = trees(tiny_spec, retain=retain, rollouts_per_update=4)
        engine.policy.how, rows = counted(engine.policy.how)
        engine.learner._how = engine.policy.how
        report = engine.step(1)
        steps[retain] = (report.metrics, sum(rows.values()))
    (never, dear), (kept, cheap) = steps.values()
    assert cheap < dear
    assert kept["work"] == never["work"]  # what a method costs is no matter of memory
    assert kept["gradient_rows"] == never["gradient_rows"]
    assert kept["grad_norm"] == pytest.approx(never["grad_norm"], rel=1e-4)


def test_images_are_dropped_before_the_update(tiny_spec):
    engine = trees(tiny_spec)
    seen = []
    update = engine.learner.update
    with patch.object(engine.learner, "update", lambda sampled, *rest: seen.append(sampled) or update(sampled, *rest)):
        engine.step(1)
    (sampled,) = seen
    assert len(sampled.whole.images) == len(sampled.own[0].images) == 0
    assert len(sampled.whole.latents) == 8


def test_with_several_shards_it_is_weighed_against_uneven_parts():
    even = plan_of(IndependentTree(), [4, 4], [[1, 1, 1, 0]] * 2)
    assert worth_keeping(Partition.of(even, 1), np.arange(8))
    assert worth_keeping(Partition.of(even, 2), np.arange(8))
    assert not worth_keeping(Partition.of(even, 2), np.arange(4))  # all of the first update lies in one part
    assert worth_keeping(Partition.of(even, 2), np.array([0, 4]))


# --- waiting ---------------------------------------------------------------------------------------------------------

WAITS = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__float__", "__int__", "__index__", "unique")


class Waits(TorchFunctionMode):
    """Counts what a GPU would be waited for: a look at values, and arrays that go there."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in WAITS or (name == "to" and any(isinstance(each, torch.device) for each in args)):
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


def test_an_update_waits_less_than_once_a_micro_batch_and_sampling_once_a_level(build):  # noqa: F811
    plan = plan_of(IndependentTree(), [16, 16], [[1, 1, 1, 0]] * 2)
    how = execution(build("gaussian"), 4, micro_batch=64)  # whose network itself never waits
    cond = how.model.encode(asked(PROMPTS["gaussian"]))
    with Waits() as sampling:
        rollouts = roll_out(how, plan, cond, StepNoise(0))
    levels = plan.num_steps
    assert sum(sampling.found.values()) <= levels + 6  # and at both ends of the whole plan
    credit = torch.linspace(-1, 1, plan.trained_edges)
    taught = learner(how, micro_batch=4)
    with Waits() as learning:
        taught.update(rollouts, credit, cond, np.random.default_rng(0), StepNoise(0))
    batches = plan.trained_edges // 4
    assert sum(learning.found.values()) <= 10 < batches  # a handful in the whole update


def test_the_room_of_a_step_is_a_share_of_what_is_free(monkeypatch, build):  # noqa: F811
    monkeypatch.setattr(retained, "free_bytes", lambda device: 1000)
    room = Room(build("tiny").policy, torch.device("cpu"), "auto", Place())
    room.refill()
    assert room.has(1)
    assert room._left == 500
