"""Which GPUs the runs of one command see: one each, unless any of them names a device by number."""

from __future__ import annotations

import pytest

from aegpo.config.loading import load_experiment_file
from aegpo.plugin.manager import load_registries, plugin_manager
from aegpo.rewards.clip import ClipReward
from aegpo.rewards.pickscore import PickScoreReward
from aegpo.runs.child_processes import devices_of, divide

GPUS = ("0", "1", "2", "3")


def seen(gpus, devices, jobs=None, runs=6):
    """The GPUs that each slot's runs are limited to; None: to none of them."""
    return [share.get("CUDA_VISIBLE_DEVICES") for share in divide(8, gpus, devices, jobs, runs)]


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("devices", [{"auto"}, {"cuda"}, {"auto", "cpu"}, {"cuda", "cpu"}, {"auto", "cuda"}])
def test_runs_that_take_any_gpu_get_one_each_whatever_scores_on_the_cpu(count, devices):
    assert seen(GPUS[:count], devices) == list(GPUS[:count])


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("devices", [{"auto", "cuda:1"}, {"cuda:0"}, {"cuda", "cuda:3"}, {"cpu", "cuda:1"}])
def test_a_device_named_by_number_anywhere_shows_every_gpu_and_holds_one_run(count, devices):
    assert seen(GPUS[:count], devices) == [None]
    assert seen(GPUS[:count], devices, jobs=3) == [None] * 3


def test_without_gpus_every_core_has_a_run_and_a_gpu_that_is_asked_for_has_one():
    assert seen((), {"auto", "cpu"}) == [None] * 6
    assert seen((), {"cuda"}) == [None]


def test_runs_on_the_cpu_leave_the_gpus_alone():
    assert seen(GPUS, {"cpu"}) == [None] * 6


def test_more_jobs_than_gpus_go_round():
    assert seen(GPUS[:2], {"auto", "cpu"}, jobs=5) == ["0", "1", "0", "1", "0"]


@pytest.fixture
def experiment(pytestconfig):
    path = pytestconfig.rootpath / "experiments" / "smoke.yaml"
    return load_experiment_file(path, load_registries(plugin_manager())).arms["grpo"]


def test_an_experiment_names_its_own_device_and_those_of_all_its_rewards(experiment):
    assert devices_of(experiment) == {"auto"}
    assert devices_of(experiment.model_copy(update={"device": "cuda:2"})) == {"cuda:2"}
    for_training = (PickScoreReward(device="cuda:1"), ClipReward(device="cpu"))
    assert devices_of(experiment.model_copy(update={"rewards": for_training})) == {"auto", "cuda:1", "cpu"}
    held_out = experiment.evaluation.model_copy(update={"rewards": (ClipReward(device="cuda:3"),)})
    assert devices_of(experiment.model_copy(update={"evaluation": held_out})) == {"auto", "cuda:3"}


def test_a_run_whose_reward_is_on_another_gpu_sees_both(experiment):
    named = devices_of(experiment.model_copy(update={"rewards": (PickScoreReward(device="cuda:1"),)}))
    assert seen(GPUS[:2], named) == [None]
