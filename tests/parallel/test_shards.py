"""The promise of shards: on 1, 2 and 4 processes the same bits, for every way to sample and to learn."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from ports import free_port

from aegpo.config.loading import load_experiment_file
from aegpo.core.interfaces import Advantage
from aegpo.core.parts import AdvantageSpec
from aegpo.errors import AegpoError, ContractError
from aegpo.parallel.team import Team
from aegpo.plugin.manager import load_registries, plugin_manager
from aegpo.train.engine import Engine
from aegpo.train.pieces import piece, shared_out, shares

pytestmark = pytest.mark.timeout(900)  # of a fixture and a test, each of which starts processes
HERE = Path(__file__).parent
FILE = HERE / "shards.yaml"
ARMS = tuple(load_experiment_file(FILE, load_registries(plugin_manager())).arms)


def launched(processes: int, shards: int, arms: Sequence[str], file: Path = FILE):
    """What the first process says of the arms."""
    port = free_port()
    started = []
    for rank in range(processes):
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        told = {name: str(value) for name, value in {**ranks, "MASTER_PORT": port, "OMP_NUM_THREADS": 1}.items()}
        command = [sys.executable, str(HERE / "shard_worker.py"), str(file), str(shards), *arms]
        environment = {**os.environ, **told, "MASTER_ADDR": "127.0.0.1"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, env=environment, **pipes))
    answers = [process.communicate(timeout=800) for process in started]
    assert not any(process.returncode for process in started), "\n".join(error[-2000:] for _, error in answers)
    return json.loads(answers[0][0])["arms"]


@pytest.mark.slow
def test_two_processes_find_the_bits_of_one():
    arms = ("aegpo-rollout", "forward")
    assert launched(2, 4, arms) == launched(1, 4, arms)


@pytest.fixture(scope="module")
def alone():
    return launched(1, 4, ARMS)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_any_number_of_processes_finds_the_bits_of_one(alone, processes):
    """Weights, averages, moments, generators, metrics, decisions, signals, evaluations and their images."""
    found = launched(processes, 4, ARMS)
    assert list(found) == list(ARMS)
    wrong = {arm: [kind for kind in found[arm] if found[arm][kind] != alone[arm][kind]] for arm in ARMS}
    assert not any(wrong.values()), wrong


@pytest.mark.slow
def test_more_shards_than_prompts_leave_some_empty_and_the_bits_the_same():
    arms = ("gain", "trunk", "groups", "aegpo")
    assert launched(2, 8, arms) == launched(1, 8, arms)


@pytest.mark.slow
def test_a_number_of_processes_that_halves_nothing_is_equal_to_rounding(alone):
    """Decisions and first rewards are the same, sums are not: the weights' checksums would be equal by chance only."""
    found = launched(3, 4, ("grpo",))
    assert found["grpo"].keys() == alone["grpo"].keys()
    assert found["grpo"]["rng"] == alone["grpo"]["rng"]


def engine_of(arm: str, shards: int, **changes) -> Engine:
    experiment = load_experiment_file(FILE, load_registries(plugin_manager())).experiment(arm, 0)
    return Engine.build(experiment.model_copy(update=changes), Team.alone(shards))


@pytest.mark.parametrize("arm", ["grpo", "trunk", "path"])
def test_shards_move_a_step_by_rounding_only(arm):
    whole, cut = engine_of(arm, 1), engine_of(arm, 3)
    one, other = whole.step(1), cut.step(1)
    assert one.counts.tolist() == other.counts.tolist()
    assert other.metrics["reward"] == pytest.approx(one.metrics["reward"], abs=1e-5)
    assert other.metrics["grad_norm"] == pytest.approx(one.metrics["grad_norm"], rel=1e-3)
    assert other.metrics["trained_edges"] == one.metrics["trained_edges"]
    assert other.metrics["updated_edges"] == one.metrics["updated_edges"]
    moved = zip(whole.policy.weights.trained.values(), cut.policy.weights.trained.values(), strict=True)
    assert all(torch.allclose(*pair, atol=1e-3) for pair in moved)


def test_what_parts_of_a_tree_repeat_is_counted():
    whole, cut = engine_of("trunk", 1).step(1).metrics, engine_of("trunk", 4).step(1).metrics
    assert cut["forwards"] >= whole["forwards"]
    assert cut["work"] - cut["forwards"] == whole["work"] - whole["forwards"]


class Looking(AdvantageSpec):
    """Credit by what the images look like."""

    kind: str = "looking"

    def build(self) -> Advantage:
        return _Looks()


class _Looks:
    def levels(self, plan):
        return torch.zeros(0, dtype=torch.int64).numpy()

    def estimate(self, scores, weights, rollouts):
        return rollouts.images.mean(dim=(1, 2, 3))[rollouts.edges.rollout]


def test_an_advantage_that_looks_at_all_images_is_told_that_nobody_has_them():
    engine_of("grpo", 1, advantage=Looking()).step(1)
    with pytest.raises(ContractError, match=r"cut into shards.*'parallel.shards: 1'"):
        engine_of("grpo", 2, advantage=Looking()).step(1)


def test_parts_that_remember_what_they_saw_need_one_process():
    from aegpo.core.processes import Place
    from aegpo.train.pieces import refuse_memories

    two = Team(Place(0, 2, 0, 2), None, 2)
    refuse_memories(two, ["advantage", "signal-entropy", "selector"])
    refuse_memories(Team.alone(2), ["reward-counting"])
    with pytest.raises(AegpoError, match=r"reward counting keeps a state .* start the run with one process"):
        refuse_memories(two, ["advantage", "reward-counting"])


def test_shares_are_neighbours_that_differ_by_one():
    for count, parts in [(10, 4), (3, 8), (0, 2), (64, 64), (7, 1)]:
        cut = shares(count, parts)
        rows = [row for each in cut for row in range(each.start, each.stop)]
        sizes = {each.stop - each.start for each in cut}
        assert rows == list(range(count))
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("least", [1, 3, 100])
def test_what_is_shared_out_comes_back_in_order(least):
    seen = []

    def work(rows):
        seen.append(rows.stop - rows.start)
        return [torch.arange(10)[rows], torch.arange(20).view(10, 2)[rows]]

    first, second = shared_out(Team.alone(4), "signals", 10, work, least)
    assert torch.equal(first, torch.arange(10))
    assert torch.equal(second, torch.arange(20).view(10, 2))
    assert min(seen) >= min(least, 2)
    assert len(seen) == {1: 4, 3: 3, 100: 1}[least]


def test_a_piece_draws_from_generators_of_its_own_and_leaves_no_trace():
    team = Team.alone(4)
    torch.manual_seed(5)
    before, drawn = torch.get_rng_state(), {}
    for shard in (2, 0):
        with piece(team, "rollouts", shard):
            drawn[shard] = torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before)
    with piece(team, "rollouts", 2):
        assert torch.equal(torch.rand(3), drawn[2])
    assert not torch.equal(drawn[0], drawn[2])
    with piece(team, "update", 2):
        assert not torch.equal(torch.rand(3), drawn[2])
    with piece(Team.alone(), "rollouts", 0):
        torch.rand(1)
    assert not torch.equal(torch.get_rng_state(), before)
