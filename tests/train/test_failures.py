"""What fails while a run is under way: parts that raise, memory that runs out; told by name, and nothing is lost."""

from __future__ import annotations

from typing import ClassVar, Literal

import pytest
import torch
from test_engine import assert_same_report, assert_same_weights, build, run
from worlds import BrightnessReward, GaussianModel, GaussianSpec, small_experiment

from aegpo.core.memory import enough_memory, is_shortage, lower
from aegpo.core.sections import OptimizerSpec, Positive, RolloutsSpec
from aegpo.errors import ContractError, MemoryShortageError, RewardError
from aegpo.method.advantages import GroupAdvantage
from aegpo.method.allocators import UniformAllocator
from aegpo.method.objectives import ClippedObjective
from aegpo.method.planning import problems
from aegpo.method.samplers import FlowSde
from aegpo.method.selectors import UniformSelector
from aegpo.method.trees import IndependentTree
from aegpo.runs import checkpoints


def oops(*_, **__):
    raise KeyError("oops")


class BadAllocator(UniformAllocator):
    allocate = oops


class BadSelector(UniformSelector):
    select = oops


class BadTree(IndependentTree):
    plan = oops


class BadSampler(FlowSde):
    transition = oops


class BadAdvantage(GroupAdvantage):
    estimate = oops


class BadObjective(ClippedObjective):
    loss = oops


class BadReward(BrightnessReward):
    build = oops


class BadModel(GaussianSpec):
    """Fails in one of its members."""

    kind: Literal["bad"] = "bad"  # type: ignore[assignment]
    member: str

    def build(self, device):
        if self.member == "build":
            oops()
        model = GaussianModel(self)
        setattr(model, self.member, oops)
        return model


@pytest.mark.parametrize(
    ("changes", "who"),
    [
        ({"allocator": BadAllocator()}, "allocator 'uniform'"),
        ({"selector": BadSelector()}, "selector 'uniform'"),
        ({"tree": BadTree()}, "tree 'independent'"),
        ({"sampler": BadSampler()}, "sampler 'flow-sde'"),
        ({"advantage": BadAdvantage()}, "advantage 'group'"),
        ({"objective": BadObjective()}, "objective 'clipped'"),
        ({"rewards": (BadReward(),)}, "reward 'brightness'"),
        *(({"model": BadModel(member=each)}, "model 'bad'") for each in ("build", "encode", "velocity", "decode")),
    ],
)
def test_a_part_that_raises_is_blamed_by_kind_and_name(changes, who):
    with pytest.raises(ContractError) as error:
        build(small_experiment(**({"model": GaussianSpec()} | changes)))[0].step(1)
    assert str(error.value) == f"{who} failed with KeyError: 'oops'"
    assert isinstance(error.value.__cause__, KeyError)


def test_a_part_that_decides_is_blamed_when_the_file_is_checked():
    (problem,) = problems(small_experiment(GaussianSpec(), tree=BadTree()))
    assert (problem.location, problem.message) == (("tree",), "tree 'independent' failed with KeyError: 'oops'")


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("not enough memory: you tried to allocate 9 bytes."),
        MemoryError(),
    ],
)
def test_every_way_to_say_that_memory_ran_out_is_known(error):
    assert is_shortage(error)
    told = pytest.raises(MemoryShortageError, match=r"^out of memory while it ran \(.*\); lower it$")
    with told, enough_memory("it ran", "lower it"):
        raise error


def test_other_errors_pass_and_a_real_allocation_that_fails_does_not():
    with pytest.raises(RuntimeError, match="shapes"), enough_memory("it ran", "lower it"):
        raise RuntimeError("shapes do not fit")
    with pytest.raises(MemoryShortageError, match="DefaultCPUAllocator"), enough_memory("it ran", "lower it"):
        torch.empty(2**62, dtype=torch.uint8)


def test_a_micro_batch_of_one_cannot_be_lowered():
    assert lower("rollouts.micro_batch", 8) == "lower 'rollouts.micro_batch', which is 8"
    assert lower("rollouts.micro_batch", 1).startswith("'rollouts.micro_batch' is 1 already: ")


class Hungry(GaussianSpec):
    """Has no memory for more than so many latents at once: those that learn, or those that do not."""

    kind: Literal["hungry"] = "hungry"  # type: ignore[assignment]
    limit: ClassVar[list[int]] = [0]  # latents; 0: no limit
    learning: ClassVar[list[bool]] = [False]
    calls: ClassVar[list[int]] = [0]  # that pass before the limit holds

    def build(self, device):
        return HungryModel(self)


class HungryModel(GaussianModel):
    def velocity(self, latents, sigma, cond):
        if torch.is_grad_enabled() == Hungry.learning[0] and 0 < Hungry.limit[0] < len(latents):
            Hungry.calls[0] -= 1
            if Hungry.calls[0] < 0:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has no more")
        return super().velocity(latents, sigma, cond)


def starve(limit, learning=False, calls=0):
    Hungry.limit[0], Hungry.learning[0], Hungry.calls[0] = limit, learning, calls


@pytest.fixture(autouse=True)
def _fed():
    starve(0)


HUNGRY = {"optimizer": OptimizerSpec(learning_rate=0.01, micro_batch=16, retain="never"), "training_steps": 4}
SMALLER = {"optimizer": OptimizerSpec(learning_rate=0.01, micro_batch=4, retain="never"), "training_steps": 4}


# A step has 4 velocity calls of 8 rollouts and 2 of 16 transitions; painting 4 held-out prompts stays below the limit.
@pytest.mark.parametrize(
    ("learning", "calls", "doing", "setting", "kept"),
    [
        (False, 8, "rollouts were sampled", "'rollouts.micro_batch', which is 64", 2),
        (False, 12, "rollouts were sampled", "'rollouts.micro_batch', which is 64", 3),
        (True, 0, "the policy was updated", "'optimizer.micro_batch', which is 16", None),
        (True, 6, "the policy was updated", "'optimizer.micro_batch', which is 16", 3),
    ],
)
def test_memory_that_runs_out_costs_no_finished_step(tmp_path, learning, calls, doing, setting, kept):
    starve(7, learning, calls)
    with pytest.raises(MemoryShortageError) as error:
        run(small_experiment(Hungry(), **HUNGRY), tmp_path / "broken")
    told = f"out of memory while {doing} (OutOfMemoryError: CUDA out of memory); lower {setting}\n"
    saved = "nothing was learned yet" if kept is None else f"step {kept} and all before it are saved"
    assert str(error.value) == f"{told}{saved}; the same command goes on from there"
    checkpoint = checkpoints.load_latest(tmp_path / "broken" / "checkpoints")
    assert (checkpoint and checkpoint.step) == kept
    smaller = small_experiment(
        Hungry(),
        rollouts=RolloutsSpec(prompts_per_step=2, rollouts_per_step=8, denoising_steps=4, micro_batch=4),
        **SMALLER,
    )
    engine, _, outcome = run(smaller, tmp_path / "broken")
    assert outcome == "finished"
    starve(0)
    straight, _, _ = run(small_experiment(Hungry(), **HUNGRY), tmp_path / "straight")
    for name, weight in straight.policy.model.policy.state_dict().items():
        torch.testing.assert_close(engine.policy.model.policy.state_dict()[name], weight)


def test_a_step_whose_weights_moved_before_memory_ran_out_is_not_saved(tmp_path):
    halves = OptimizerSpec(learning_rate=0.01, micro_batch=16, rollouts_per_update=4, retain="never")
    starve(7, learning=True, calls=5)  # in the second update of step 3
    with pytest.raises(MemoryShortageError, match="step 2 and all before it are saved"):
        run(small_experiment(Hungry(), optimizer=halves), tmp_path / "broken")
    assert checkpoints.steps_in(tmp_path / "broken" / "checkpoints") == (2,)
    starve(0)
    engine, recorder, _ = run(small_experiment(Hungry(), optimizer=halves), tmp_path / "broken")
    straight, whole, _ = run(small_experiment(Hungry(), optimizer=halves), tmp_path / "straight")
    assert_same_weights(engine, straight)
    for mine, yours in zip(reversed(recorder.reports), reversed(whole.reports), strict=False):
        assert_same_report(mine, yours)


def test_memory_that_runs_out_before_the_first_step_says_so(tmp_path):
    starve(3)  # already the held-out prompts are too many
    with pytest.raises(MemoryShortageError, match=r"images were painted .*lower 'rollouts\.micro_batch'"):
        run(small_experiment(Hungry()), tmp_path)


class HungryReward(BrightnessReward):
    kind: Literal["hungry-reward"] = "hungry-reward"  # type: ignore[assignment]
    micro_batch: Positive = 32

    def score(self, images, prompts):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


class HungryPlain(BrightnessReward):
    def score(self, images, prompts):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.mark.parametrize(
    ("reward", "remedy"),
    [
        (HungryReward(), "lower 'hungry-reward.micro_batch', which is 32"),
        (HungryPlain(), "let it score fewer images at once, or run it elsewhere: see 'aegpo serve-reward'"),
    ],
)
def test_a_reward_without_memory_is_named_with_its_own_micro_batch(reward, remedy):
    engine, _ = build(small_experiment(GaussianSpec(), rewards=(reward,)))
    with pytest.raises(RewardError) as error:
        engine.step(1)
    told = f"reward {reward.label!r} ran out of memory (OutOfMemoryError: CUDA out of memory); {remedy}"
    assert str(error.value) == told
    assert error.value.__cause__ is None


def starving(after):
    """A method that runs out of memory at its call number `after` + 1."""
    left = [after]

    def method(self, *args):
        left[0] -= 1
        if left[0] < 0:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return self.plain(*args)

    return method


class HungryAdvantage(GroupAdvantage):
    plain = GroupAdvantage.estimate


class HungryObjective(ClippedObjective):
    plain = ClippedObjective.loss


class HungryTree(IndependentTree):
    plain = IndependentTree.plan


@pytest.mark.parametrize(
    ("field", "part", "method", "doing", "setting"),
    [
        ("advantage", HungryAdvantage, "estimate", "credit was given", "'rollouts.rollouts_per_step', which is 8"),
        ("objective", HungryObjective, "loss", "the policy was updated", "'optimizer.micro_batch', which is 64"),
        ("tree", HungryTree, "plan", "rollouts were planned", "'rollouts.rollouts_per_step', which is 8"),
    ],
)
def test_memory_that_runs_out_in_any_part_costs_no_finished_step(
    field, part, method, doing, setting, tmp_path, monkeypatch
):
    monkeypatch.setattr(part, method, starving(3), raising=False)  # in step 4
    with pytest.raises(MemoryShortageError) as error:
        run(small_experiment(GaussianSpec(), optimizer=OptimizerSpec(retain="never"), **{field: part()}), tmp_path)
    told = f"out of memory while {doing} (OutOfMemoryError: CUDA out of memory); lower {setting}\n"
    assert str(error.value) == f"{told}step 3 and all before it are saved; the same command goes on from there"
    assert checkpoints.steps_in(tmp_path / "checkpoints")[-1] == 3
