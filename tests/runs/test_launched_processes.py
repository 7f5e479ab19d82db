"""A command that a launcher started several times over without telling why is refused before anything is written."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ports import free_port
from rich.console import Console

from aegpo.commands.export import ExportRequest, export
from aegpo.commands.launch_request import LaunchRequest
from aegpo.commands.run import launch
from aegpo.errors import AegpoError
from aegpo.runs.child_processes import Child, run_children
from aegpo.runs.progress import Lines

TINY = """
name: tiny
training_steps: 1
device: cpu
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
evaluation: {{every: 1, images: 2}}
"""


@pytest.fixture
def folder(tmp_path, tiny_weights) -> Path:
    (tmp_path / "tiny.yaml").write_text(TINY.format(weights=tiny_weights))
    return tmp_path


def under_torchrun(folder, rank, size):
    """`aegpo run` in one of the processes that torchrun starts."""
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    told = {name: str(value) for name, value in {**ranks, "MASTER_PORT": free_port(), "OMP_NUM_THREADS": 1}.items()}
    environment = {**os.environ, **told, "MASTER_ADDR": "127.0.0.1"}
    command = [sys.executable, "-m", "aegpo", "run", "tiny.yaml", "--out", "out", "--no-report"]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=240
    )


@pytest.mark.slow
def test_a_launcher_that_starts_one_process_is_fine(folder):
    done = under_torchrun(folder, 0, size=1)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (folder / "out" / "tiny" / "main" / "seed-0" / "finished.json").exists()


@pytest.mark.parametrize("name", ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"])
def test_processes_that_were_not_told_who_they_are_say_how_to_start_and_write_nothing(folder, monkeypatch, name):
    for variable in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv(name, "2")
    expected = r"2 processes were launched, but not told who they are \(RANK, .*'aegpo run FILE --processes N'"
    with pytest.raises(AegpoError, match=expected):
        launch(LaunchRequest(folder / "tiny.yaml", out=folder / "out"))
    assert not (folder / "out").exists()


@pytest.mark.parametrize("name", ["WORLD_SIZE", "PMI_SIZE"])
def test_commands_of_one_process_are_refused(folder, monkeypatch, name):
    monkeypatch.setenv(name, "2")
    with pytest.raises(AegpoError, match=rf"2 processes were launched \({name}=2\), but this command is one process"):
        export(ExportRequest(folder, folder / "exported"))


def test_children_of_a_launched_process_do_not_take_themselves_for_it(tmp_path, monkeypatch):
    told = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in {**told, "TORCHELASTIC_RUN_ID": "x"}.items():
        monkeypatch.setenv(name, value)
    code = "import os; print([name for name in os.environ if name in {names} or name.startswith('TORCHELASTIC')])"
    command = [sys.executable, "-c", code.format(names=[*told])]
    child = Child("one", command, tmp_path, tmp_path / "run.log", 1)
    assert run_children([child], [{}], Lines(Console(file=io.StringIO()), every_step=False)) == ([], False)
    assert child.log.read_text().splitlines()[-1] == "[]"


def test_a_number_of_threads_that_is_none_is_told_before_anything_is_written(folder, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "all")
    with pytest.raises(AegpoError, match="OMP_NUM_THREADS is 'all'"):
        launch(LaunchRequest(folder / "tiny.yaml", out=folder / "out"))
    assert not (folder / "out").exists()
