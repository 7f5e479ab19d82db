"""One number of threads for every library, in children and in runs that go on."""

from __future__ import annotations

import io
import json
import shutil
import sys

import pytest
import torch
from rich.console import Console

from aegpo.commands.launch_request import LaunchRequest
from aegpo.commands.run import launch
from aegpo.errors import AegpoError
from aegpo.runs.child_processes import Child, run_children
from aegpo.runs.progress import Lines
from aegpo.runs.threads import VARIABLES, allowed, thread_variables

TINY = """
name: tiny
training_steps: 2
model: {{kind: shapes, weights: {weights}}}
prompts: {{train_count: 2, evaluation_count: 2}}
rollouts: {{prompts_per_step: 2, rollouts_per_step: 4, denoising_steps: 3}}
rewards: [palette]
allocator: uniform
selector: uniform
tree: independent
sampler: flow-sde
advantage: group
objective: clipped
checkpoint: {{every: 1}}
evaluation: {{every: 2, images: 2}}
arms:
  one: {{}}
  two: {{optimizer: {{weight_decay: 0}}}}
"""
SHOWN = "import os, torch; print([os.environ.get(n) for n in {names}], torch.get_num_threads())"


@pytest.fixture
def environment(monkeypatch):
    """No variable of threads, until a test sets one."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def of_child(folder, share, begun=None):
    """What a child sees of its threads: every variable, and torch's number."""
    code = SHOWN.format(names=VARIABLES)
    child = Child("one", [sys.executable, "-c", code], folder, folder / "run.log", 1, begun)
    assert run_children([child], [share], Lines(Console(file=io.StringIO()), every_step=False)) == ([], False)
    return child.log.read_text().splitlines()[-1]


def equal(count):
    return f"{[str(count)] * 3} {count}"


@pytest.mark.parametrize("variable", VARIABLES)
def test_a_child_computes_with_what_any_variable_asks_for_in_every_library(tmp_path, environment, variable):
    environment.setenv(variable, "1")
    assert of_child(tmp_path, thread_variables(2)) == equal(1)


def test_a_child_without_a_wish_computes_with_its_share(tmp_path, environment):
    assert of_child(tmp_path, thread_variables(2)) == equal(2)


@pytest.mark.slow
def test_a_child_that_goes_on_computes_with_the_threads_it_was_begun_with(tmp_path, environment):
    assert of_child(tmp_path, thread_variables(1), begun=2) == equal(2)
    environment.setenv("OMP_NUM_THREADS", "1")
    assert of_child(tmp_path, thread_variables(2), begun=2) == equal(1)


def test_more_threads_than_there_are_to_share_are_not_given(environment):
    environment.setenv("OMP_NUM_THREADS", "8")
    environment.setenv("MKL_NUM_THREADS", "4,2")
    assert (allowed(2), allowed(16)) == (2, 4)


@pytest.mark.parametrize("text", ["many", "0", "-1", "1.5"])
def test_a_variable_that_is_no_number_of_threads_is_refused(environment, text):
    environment.setenv("OMP_NUM_THREADS", text)
    with pytest.raises(AegpoError, match=f"OMP_NUM_THREADS is '{text}' in the environment; a number of threads such"):
        allowed(2)


def test_an_empty_variable_asks_for_nothing(environment):
    environment.setenv("OMP_NUM_THREADS", "")
    assert allowed(3) == 3


# --- a run that goes on -----------------------------------------------------------------------------------------------


@pytest.fixture
def start(tmp_path, tiny_weights, environment, capsys):
    """Starts a run in this process under some threads of torch's and of the environment's; what it printed."""
    (tmp_path / "tiny.yaml").write_text(TINY.format(weights=tiny_weights))
    before = torch.get_num_threads()

    def run(threads, *arms, jobs=1, **asked):
        for name in VARIABLES:
            environment.delenv(name, raising=False)
        for name, value in asked.items():
            environment.setenv(name, str(value))
        torch.set_num_threads(threads)
        request = LaunchRequest(tmp_path / "tiny.yaml", arms=arms, out=tmp_path / "out", jobs=jobs, report=False)
        assert launch(request) == 0
        return "".join(capsys.readouterr()).replace("\n", "")

    yield run
    torch.set_num_threads(before)


def manifest(folder, arm="one"):
    return json.loads((folder / "out" / "tiny" / arm / "seed-0" / "manifest.json").read_text())


def half_done(folder, arm="one"):
    """Takes back the second step of a finished run, as if it had been stopped after the first."""
    run = folder / "out" / "tiny" / arm / "seed-0"
    (run / "finished.json").unlink()
    shutil.rmtree(run / "checkpoints" / "step-000002")


def test_a_first_start_computes_with_the_fewest_threads_any_variable_asks_for(tmp_path, start):
    start(2, "one", OMP_NUM_THREADS=1, MKL_NUM_THREADS=2)
    assert manifest(tmp_path)["threads"] == torch.get_num_threads() == 1


def test_a_run_that_goes_on_keeps_its_threads_unless_fewer_are_asked_for_which_is_told_and_noted(tmp_path, start):
    start(2, "one")
    assert manifest(tmp_path)["threads"] == 2
    half_done(tmp_path)
    assert "threads" not in start(3, "one", OMP_NUM_THREADS=3)
    assert manifest(tmp_path)["threads"] == torch.get_num_threads() == 2
    assert "threads_changed" not in manifest(tmp_path)
    half_done(tmp_path)
    told = start(2, "one", OMP_NUM_THREADS=1)
    assert "one seed 0: goes on with fewer threads than before: 2 -> 1, as the environment asks; sums are split" in told
    assert "bits may differ" in told
    assert manifest(tmp_path)["threads"] == torch.get_num_threads() == 1
    assert manifest(tmp_path)["threads_changed"] == [{"after_step": 1, "from": 2, "to": 1}]
    half_done(tmp_path)
    assert "threads" not in start(2, "one")  # from then on it is the run's own number
    assert manifest(tmp_path)["threads"] == torch.get_num_threads() == 1


@pytest.mark.slow
def test_children_that_go_on_keep_their_threads_whatever_their_share_is_now(tmp_path, start, monkeypatch):
    for arm in ("one", "two"):
        start(2, arm)
        half_done(tmp_path, arm)
    monkeypatch.setattr("aegpo.commands.run.usable_cores", lambda: 1)
    assert "threads" not in start(1, jobs=1)
    assert [manifest(tmp_path, arm)["threads"] for arm in ("one", "two")] == [2, 2]
    half_done(tmp_path, "two")
    assert "two seed 0: goes on with fewer threads than before: 2 -> 1" in start(1, jobs=1, OMP_NUM_THREADS=1)
    assert manifest(tmp_path, "two")["threads"] == 1
