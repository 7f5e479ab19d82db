"""Which prompts of the list a step asks."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
import pytest
import worlds
from hypothesis import given
from hypothesis import strategies as st
from worlds import GaussianSpec, small_experiment

from aegpo.config.loading import load_experiment_file
from aegpo.core.parts import CurriculumSpec
from aegpo.core.sections import PromptsSpec, RolloutsSpec
from aegpo.errors import AegpoError, ContractError
from aegpo.method.allocators import RewardStdAllocator
from aegpo.method.costs import cost
from aegpo.models.sd3 import Sd3Spec
from aegpo.plugin.manager import load_registries, plugin_manager
from aegpo.prompts.curricula import BoundaryCurriculum
from aegpo.train.engine import Engine

SOME = PromptsSpec(train_count=6, evaluation_count=2)
means = st.lists(st.one_of(st.just(np.nan), st.floats(-1, 2)), min_size=4, max_size=20)


def chosen(spec, mean, count, seed=0):
    rule = spec.build(len(mean), count, seed=7)
    found = rule.choose(worlds.signals(3, len(mean), 4, reward_mean=mean), count, np.random.default_rng(seed))
    assert set(found.tolist()) <= set(rule.candidates(3).tolist())
    return found


@given(means, st.data())
def test_a_step_has_new_prompts_then_those_of_the_boundary_then_the_nearest(mean, data):
    count = data.draw(st.integers(1, len(mean)))
    spec = BoundaryCurriculum(low=0.2, high=0.8, unseen=data.draw(st.sampled_from([0.0, 0.25, 1.0])))
    found, mean = chosen(spec, mean, count), np.array(mean)
    assert len(set(found.tolist())) == count
    new, within = np.isnan(mean), (mean >= 0.2) & (mean <= 0.8)
    share = min(round(spec.unseen * count), new.sum())
    bounded = min(count - share, within.sum())
    assert within[found].sum() == bounded
    assert new[found].sum() == share + min(count - share - bounded, new.sum() - share)
    outside = ~new & ~within
    taken = np.isin(np.arange(len(mean)), found)
    distance = np.maximum(0.2 - mean, mean - 0.8)
    if (outside & taken).any() and (outside & ~taken).any():
        assert distance[outside & taken].max() <= distance[outside & ~taken].min()


def test_the_choice_is_a_pure_function_of_what_is_known_seed_and_step():
    mean = [0.5] * 12
    draws = {tuple(chosen(BoundaryCurriculum(), mean, 3, seed)) for seed in range(20)}
    assert len(draws) > 10
    assert np.array_equal(chosen(BoundaryCurriculum(), mean, 3, 4), chosen(BoundaryCurriculum(), mean, 3, 4))


def test_a_run_at_the_boundary_asks_by_the_rewards_it_has_seen_and_goes_on_from_a_checkpoint():
    curriculum = BoundaryCurriculum(low=0.0, high=0.55, unseen=0.5)
    spec = small_experiment(GaussianSpec(), curriculum=curriculum, prompts=SOME)
    straight, asked = Engine.build(spec), []
    for number in range(1, 7):
        asked.append([prompt.index for prompt in straight.step(number).prompts])
        if number == 3:
            tensors, state = straight.state_dict()
    assert len({index for pair in asked[:3] for index in pair}) > 3  # new ones first
    resumed = Engine.build(spec)
    resumed.load_state_dict(tensors, state)
    assert [[prompt.index for prompt in resumed.step(number).prompts] for number in (4, 5, 6)] == asked[3:]


def test_the_usual_order_asks_what_it_always_did():
    engine = Engine.build(small_experiment(GaussianSpec(), prompts=SOME))
    first = np.random.default_rng((7919, 0, 0)).permutation(6)
    assert [prompt.index for step in (1, 2, 3) for prompt in engine.asked(step)] == first.tolist()


def test_a_step_in_which_one_pass_over_the_list_ends_and_the_next_begins_may_ask_a_prompt_twice():
    rollouts = RolloutsSpec(prompts_per_step=4, rollouts_per_step=8, denoising_steps=4)
    engine = Engine.build(
        small_experiment(GaussianSpec(), prompts=SOME, rollouts=rollouts, allocator=RewardStdAllocator(low=2, high=4))
    )
    passes = np.stack([np.random.default_rng((7919, 0, number)).permutation(6) for number in range(3)])
    reports = [engine.step(number) for number in (1, 2, 3, 4)]
    asked = [[prompt.index for prompt in report.prompts] for report in reports]
    assert np.array_equal(np.ravel(asked), passes.ravel()[:16])
    assert any(len(set(each)) < 4 for each in asked)
    assert all(report.metrics["updated_edges"] == report.metrics["trained_edges"] for report in reports)


# --- what check says -------------------------------------------------------------------------------------------------


def test_check_says_how_many_prompts_are_encoded_ahead_and_what_they_take(pipeline_folders):
    many = PromptsSpec(train_count=50, evaluation_count=2)
    few = small_experiment(GaussianSpec(), prompts=many, training_steps=3)
    assert (cost(few).candidates, cost(few).encodings) == (6, None)
    every = few.model_copy(update={"curriculum": BoundaryCurriculum()})
    assert cost(every).candidates == 50
    model = Sd3Spec(path=str(pipeline_folders["sd3"]), height=16, width=16, dtype="float32", guidance=1.0)
    length, width, pooled = model.text_shape(model.config_at_hand(model.network))
    assert model.encoding_bytes == 4 * (length * width + pooled)


def test_a_curriculum_that_reads_what_is_not_free_is_refused(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("model: shapes\nrewards: [palette]\ncurriculum: boundary\nsignals: {entropy: {rows: 9}}\n")
    registries = load_registries(plugin_manager())
    assert list(load_experiment_file(path, registries).arms["main"].sources) == ["reward-statistics"]

    class Dear(BoundaryCurriculum):
        """Reads attention entropy of every prompt."""

        reads: ClassVar[tuple[str, ...]] = ("entropy-delta",)

    spec = small_experiment(GaussianSpec(), curriculum=Dear())
    (problem,) = (found for found in spec.problems() if not found.warning)
    assert problem.location == ("curriculum",)
    assert problem.message == (
        "reads 'entropy-delta' of the whole list, which source 'entropy' does not know for free; read it in an "
        "allocator, or choose another signal"
    )


# --- foreign curricula -----------------------------------------------------------------------------------------------


class Stuck(CurriculumSpec):
    """Asks the same prompts, whatever is asked."""

    kind: Literal["stuck"] = "stuck"
    rows: tuple[int, ...] = (0, 1)

    def build(self, prompts, per_step, seed):
        return self

    def candidates(self, steps):
        return np.arange(2, dtype=np.int64)

    def choose(self, known, count, rng):
        return np.array(self.rows, dtype=np.int64)


def test_a_curriculum_from_outside_chooses_the_prompts():
    engine = Engine.build(small_experiment(GaussianSpec(), curriculum=Stuck(rows=(3, 1))))
    assert [prompt.index for prompt in engine.step(1).prompts] == [3, 1]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ((0, 9), "curriculum 'stuck' chose prompt 9; the list has 8, counted from 0"),
        ((0,), "curriculum 'stuck' returned a choice of shape (1,), int64; (2,), int64 was asked"),
    ],
)
def test_a_curriculum_that_breaks_its_promise_is_blamed(rows, message):
    engine = Engine.build(small_experiment(GaussianSpec(), curriculum=Stuck(rows=rows)))
    with pytest.raises(ContractError) as error:
        engine.step(1)
    assert error.value.message == message
    assert error.value.location == ("curriculum",)


def test_a_list_shorter_than_a_step_is_refused_whatever_the_curriculum():
    short = PromptsSpec(train_count=3, evaluation_count=2)
    rollouts = RolloutsSpec(prompts_per_step=4, rollouts_per_step=8, denoising_steps=4)
    with pytest.raises(AegpoError, match="3 training prompts are fewer than the 4 of a step"):
        Engine.build(
            small_experiment(GaussianSpec(), curriculum=BoundaryCurriculum(), prompts=short, rollouts=rollouts)
        )
