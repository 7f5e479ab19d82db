"""How evenly steps are shared out, and the tool that prints it for files."""

from __future__ import annotations

import sys

import pytest
from repository import ROOT
from worlds import BrightnessReward, GaussianSpec, small_experiment

from aegpo.core.sections import RolloutsSpec
from aegpo.method.balance import Share, balances
from aegpo.method.costs import cost
from aegpo.method.selectors import EntropyPeakSelector
from aegpo.method.trees import BranchingTree

sys.path.insert(0, str(ROOT / "tools"))

from plan_balance import main

ROLLOUTS = RolloutsSpec(prompts_per_step=4, rollouts_per_step=48, denoising_steps=10)
SPLIT = {"tree": BranchingTree(), "selector": EntropyPeakSelector(top_k=4), "rollouts": ROLLOUTS}


class Comparing(BrightnessReward):
    """A reward that compares the images of a prompt."""

    group_wise = True


def test_independent_rollouts_are_shared_out_evenly_and_nothing_is_repeated():
    one, some, five, more = balances(
        small_experiment(GaussianSpec(), rollouts=ROLLOUTS), [(1, 1), (8, 8), (5, 5), (96, 96)]
    )
    assert one == some
    assert (one.dearest, one.repeated) == (Share(1, 1), Share(0, 0))
    assert five.dearest == Share(10 * 5 / 48, 10 * 5 / 48)  # 10 of 48 rollouts
    assert more.dearest == Share(2, 2)  # half of 96 processes have a rollout


def test_trees_that_are_cut_cost_each_part_its_way():
    experiment = small_experiment(GaussianSpec(), **SPLIT)
    one, four, eight, sixteen = balances(experiment, [(1, 1), (4, 4), (8, 8), (48, 48)])
    assert one.repeated == Share(0, 0)
    assert four.dearest == Share(1, 1)  # a prompt each
    assert four.repeated == Share(0, 0)
    assert eight.repeated.high > 0
    low, high = cost(experiment).forwards.low, cost(experiment).forwards.high
    assert sixteen.dearest == Share(pytest.approx(480 / high), pytest.approx(480 / low))  # 48 ways of 10
    assert sixteen.repeated == Share(pytest.approx(480 / high - 1), pytest.approx(480 / low - 1))


def test_more_shards_than_processes_repeat_as_much_as_on_as_many_processes():
    experiment = small_experiment(GaussianSpec(), **SPLIT)
    few, many = balances(experiment, [(2, 16), (16, 16)])
    assert few.repeated == many.repeated
    assert 1 < few.dearest.high <= many.dearest.high


def test_a_reward_that_compares_keeps_the_images_of_a_prompt_together():
    comparing = small_experiment(GaussianSpec(), rewards=(Comparing(),), **SPLIT)
    four, eight = balances(comparing, [(4, 4), (8, 8)])
    assert four.dearest == Share(1, 1)
    assert eight.dearest == Share(2, 2)  # 4 of 8 processes have a prompt
    assert eight.repeated == Share(0, 0)


def test_a_share_is_printed_as_one_number_where_its_ends_are_printed_alike():
    assert str(Share(1.001, 1.004)) == "1.00"
    assert str(Share(1, 1.126)) == "1.00-1.13"


def test_the_tool_prints_what_is_counted(monkeypatch, capsys):
    ablation = str(ROOT / "experiments" / "ablation.yaml")
    monkeypatch.setattr(
        sys, "argv", ["plan_balance.py", ablation, "--arm", "grpo", "--arm", "aegpo", "--gpus", "1", "8"]
    )
    main()
    head, rule, *rows = capsys.readouterr().out.splitlines()
    assert (head, rule) == ("| plan | 1 | 8 |", "| --- | ---: | ---: |")
    assert rows[:2] == ["| ablation grpo: dearest | 1.00 | 1.00 |", "| ablation grpo: repeated | 0 % | 0 % |"]
    assert rows[2].startswith("| ablation aegpo: dearest | 1.00 | 1.")
    assert len(rows) == 4
    for wrong in (["--arm", "nope"], ["--gpus", "0"]):
        monkeypatch.setattr(sys, "argv", ["plan_balance.py", ablation, *wrong])
        with pytest.raises(SystemExit):
            main()
