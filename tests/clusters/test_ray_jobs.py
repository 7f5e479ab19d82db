"""Jobs of a real Ray of three nodes on one machine: nox -s ray installs it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from clustered import Experiment, parent_of, unbroken, until, write_tiny

pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture
def folder(tmp_path, tiny_weights) -> Path:
    write_tiny(tmp_path, tiny_weights)
    return tmp_path


@pytest.fixture
def cluster(monkeypatch) -> Iterator[Any]:
    """A head that computes nothing; the test adds nodes."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    yield made
    made.shutdown()


def test_the_loss_of_a_process_or_of_a_node_costs_no_bit_and_jobs_outlive_their_command(folder, cluster, monkeypatch):
    first = cluster.add_node(num_cpus=1)
    experiment = Experiment(folder, "--seed", "0", "--cluster", "ray", "--cluster-set", f"address={cluster.address}")
    experiment.slow()
    process = experiment.start()
    experiment.after(3)
    (running,) = experiment.computing()
    os.kill(parent_of(running), signal.SIGKILL)  # the run watches it, saves its state and ends
    until(lambda: experiment.computing() not in ([], [running]))
    assert experiment.interrupted(process) == 130
    assert "detached: 1 jobs go on" in experiment.log

    process = experiment.start()
    experiment.after(experiment.steps() + 2)
    cluster.add_node(num_cpus=1)
    lost = set(experiment.computing())
    cluster.remove_node(first, allow_graceful=False)
    until(lambda: not lost & set(experiment.computing()))
    experiment.fast()
    assert experiment.ended(process) == 0, experiment.log
    assert "of ray was submitted before" in experiment.log
    assert "waits to be started again" in experiment.log
    assert experiment.digests() == unbroken(folder, monkeypatch).digests()


def test_a_job_that_waits_for_room_is_cancelled_and_there_must_be_a_cluster(folder, cluster, monkeypatch):
    from aegpo.clusters.jobs import Job
    from aegpo.clusters.with_ray import Ray
    from aegpo.errors import AegpoError

    with pytest.raises(AegpoError, match="start one with 'ray start --head'"):
        Ray({"address": "127.0.0.1:1"}, 1, None)
    ray = Ray({"address": cluster.address}, 1, None)
    job = ray.submit(Job("0123456789", ("-c", "pass"), str(folder), f"{folder}/log", f"{folder}/end"), "one")
    assert ray.poll([job])[job].where == "pending"
    ray.cancel(job)
    until(lambda: ray.poll([job])[job].where == "over")
    ray.leave()
