"""A process of a run of sharded weights fails amid an update, where the others wait for it: all end, and it goes on."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
SOON = 60  # seconds after the fault in which the command has to end; processes wait an hour for each other
TINY = """
name: tiny
training_steps: 4
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
objective: frail
policy: {{train: full}}
checkpoint: {{every: 1}}
evaluation: {{every: 4, images: 2}}
parallel: {{weights: sharded}}
"""
# An objective that is the clipped one but for a loss of process 1, of its third training step.
FRAIL = """
import os
from pathlib import Path
from typing import Literal

import aegpo
from aegpo.method.objectives.clipped import ClippedObjective


class Frail(ClippedObjective):
    '''Fails once two checkpoints are there, if it is to.'''

    kind: Literal["frail"] = "frail"

    def loss(self, update):
        there = Path("out/tiny/main/seed-0/checkpoints/step-000002").exists()
        if os.environ.get("FAULT") and os.environ["RANK"] == "1" and there:
            Path("failed").touch()
            if os.environ["FAULT"] == "killed":
                os.kill(os.getpid(), 9)
            raise ValueError("broken here")
        return super().loss(update)


@aegpo.hookimpl
def aegpo_register_objectives(registry):
    registry.add(Frail)
"""


def launched(folder: Path, mark: str, fault: str) -> tuple[int, str]:
    """The exit code of the command, and what it says; `mark`: in the environment of all its processes."""
    command = [sys.executable, "-m", "aegpo", "run", "tiny.yaml", "--out", "out", "--no-report", "--plugin", "frail.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MARK": mark, "FAULT": fault}
    done = subprocess.run(
        [*command, "--processes", "2", "--max-restarts", "0"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    return done.returncode, done.stdout + done.stderr


def left_over(mark: str) -> list[str]:
    """The numbers of processes that still run."""
    found = []
    for path in Path("/proc").iterdir():
        try:
            ours = path.name.isdigit() and f"MARK={mark}".encode() in (path / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        found += [path.name] if ours else []
    return found


TOLD = {
    "error": "error: process 1 of 2 failed amid an update of sharded weights, so that all end: objective 'frail' "
    "failed with ValueError: broken here; the same command goes on from the newest checkpoint",
    "killed": "error: process 1 of the 2 of this run was killed by SIGKILL; the same command goes on from the newest "
    "checkpoint",
}


@pytest.mark.parametrize("fault", list(TOLD))
def test_a_process_that_fails_amid_an_update_ends_all_and_the_same_command_goes_on(tmp_path, tiny_weights, fault):
    (tmp_path / "tiny.yaml").write_text(TINY.format(weights=tiny_weights))
    (tmp_path / "frail.py").write_text(FRAIL)
    code, told = launched(tmp_path, str(tmp_path), fault)
    assert time.time() - (tmp_path / "failed").stat().st_mtime < SOON
    assert code == 1
    assert left_over(str(tmp_path)) == []
    assert told.count(TOLD[fault]) == 1, told
    assert told.count(" failed amid ") == (fault == "error"), told  # who only waits does not say that it failed
    assert told.count("Traceback") == (fault == "error"), told  # of the objective, for its author
    if fault == "killed":
        return
    code, told = launched(tmp_path, str(tmp_path), "")
    run = tmp_path / "out" / "tiny" / "main" / "seed-0"
    assert code == 0, told
    assert (run / "metrics.jsonl").read_bytes().count(b"\n") == 4
    assert (run / "finished.json").exists()
