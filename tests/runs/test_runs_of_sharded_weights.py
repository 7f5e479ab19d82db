"""A run of sharded weights over two processes: broken and gone on with, by as many processes, by one, and whole."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from aegpo.runs.checkpoints import load_latest, load_step

pytestmark = pytest.mark.slow
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
objective: clipped
policy: {{train: full, ema: 0.9}}
checkpoint: {{every: 1, keep: 4}}
evaluation: {{every: 2, images: 2}}
parallel: {{weights: sharded}}
"""
STOP = """
import os
import aegpo

@aegpo.hookimpl
def aegpo_on_step_end(run, report):
    if report.step == int(os.environ.get("STOP", 0)):
        os._exit(77)
"""
RECORDS = ("metrics.jsonl", "evaluations.jsonl")


def launched(folder: Path, out: Path, *words: str, processes: int = 2, stop: int = 0) -> str:
    """What the command says; it ends well unless it is stopped after a step."""
    several = ["--processes", str(processes)] if processes > 1 else []
    command = [sys.executable, "-m", "aegpo", "run", "tiny.yaml", "--out", str(out), "--no-report", *several, *words]
    command += ["--plugin", "stop.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "STOP": str(stop)}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=240
    )
    assert (done.returncode == 0) == (stop == 0), done.stdout + done.stderr
    return done.stdout + done.stderr


def of(out: Path) -> Path:
    return out / "tiny" / "main" / "seed-0"


def until(out: Path, target: Path, step: int) -> Path:
    """A copy of a finished run, with no checkpoint after a step."""
    shutil.copytree(out, target)
    (of(target) / "finished.json").unlink()
    for path in (of(target) / "checkpoints").iterdir():
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    return target


def moved(out: Path, other: Path) -> float:
    """How far the last weights of two runs are apart, in shares of how far they moved from the first checkpoint."""
    last, found = (load_latest(of(each) / "checkpoints", report=pytest.fail).tensors for each in (out, other))
    first = load_step(of(out) / "checkpoints", 1).tensors
    names = [name for name in last if name.startswith(("policy/", "ema/"))]

    def apart(one, two):
        return torch.stack([(one[name] - two[name]).double().square().sum() for name in names]).sum().sqrt()

    return float(apart(last, found) / apart(last, first))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_weights) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    (folder / "tiny.yaml").write_text(TINY.format(weights=tiny_weights))
    (folder / "stop.py").write_text(STOP)
    launched(folder, folder / "straight")
    return folder


@pytest.fixture
def straight(folder) -> Path:
    """The run without a break."""
    return folder / "straight"


def test_its_checkpoints_are_safetensors_and_json(straight):
    path = of(straight) / "checkpoints" / "step-000004"
    names = {path.name for path in path.iterdir()}
    assert names == {"checksums.json", "optimizer.safetensors", "rng.safetensors", "shards", "state.json"}
    written = sorted(each.name for each in (path / "shards").iterdir())
    assert written == [f"shard-0000{r}-model-0000{p}-of-00003.safetensors" for r in (1, 2) for p in (1, 2, 3)]
    assert len(json.loads((path / "checksums.json").read_text())["sha256"]) == 3 + len(written)


def test_a_killed_run_goes_on_to_the_bits_of_one_without_a_break(folder, straight, tmp_path):
    launched(folder, tmp_path / "out", "--max-restarts", "0", stop=3)
    there = [path.name for path in (of(tmp_path / "out") / "checkpoints").glob("step-*")]
    assert "step-000004" not in there
    launched(folder, tmp_path / "out")
    for name in RECORDS:
        assert (of(tmp_path / "out") / name).read_bytes() == (of(straight) / name).read_bytes()
    ends = [load_latest(of(out) / "checkpoints", report=pytest.fail).tensors for out in (straight, tmp_path / "out")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert not list((of(tmp_path / "out") / "checkpoints").glob(".*"))


def test_one_process_goes_on_and_then_two_with_sharded_weights_again(folder, straight, tmp_path):
    alone = until(straight, tmp_path / "alone", 2)
    assert "processes 2 -> 1" in launched(folder, alone, processes=1)
    assert (of(alone) / "checkpoints" / "step-000004" / "policy.safetensors").exists()
    assert moved(straight, alone) < 1e-3
    again = until(alone, tmp_path / "again", 3)
    assert "processes 1 -> 2" in launched(folder, again)
    assert (of(again) / "checkpoints" / "step-000004" / "shards").is_dir()
    assert moved(straight, again) < 1e-3


def test_two_processes_go_on_with_whole_weights(folder, straight, tmp_path):
    out = until(straight, tmp_path / "out", 2)
    sharded = {"shards": 2, "processes": 2, "sums": "rounded", "weights": "sharded"}
    assert json.loads((of(out) / "manifest.json").read_text())["parallel"] == sharded
    assert "goes on with weights sharded -> whole" in launched(folder, out, "--set", "parallel.weights=whole")
    noted = json.loads((of(out) / "manifest.json").read_text())
    whole = {"shards": 2, "processes": 2, "sums": "exact"}
    assert noted["parallel"] == whole
    assert noted["parallel_changed"] == [{"after_step": 2, "from": sharded, "to": whole}]
    assert (of(out) / "checkpoints" / "step-000004" / "policy.safetensors").exists()
    assert moved(straight, out) < 1e-3


def test_one_process_paints_with_what_two_wrote(folder, straight, tmp_path):
    command = [sys.executable, "-m", "aegpo", "sample", str(of(straight)), "--out", str(tmp_path / "images")]
    done = subprocess.run(
        [*command, "--prompt", "a red circle"], cwd=folder, capture_output=True, text=True, check=True
    )
    assert "images" in done.stdout


def test_metrics_are_means_over_edges_by_however_many_processes(straight):
    rows = [json.loads(line) for line in (of(straight) / "metrics.jsonl").read_text().splitlines()]
    assert [row["metrics"]["ratio"] for row in rows] == pytest.approx([1.0] * 4, abs=0.01)


def test_one_process_evaluates_and_profiles_what_two_wrote(folder, straight, tmp_path):
    for command in ("evaluate", "profile-entropy"):
        words = [command, str(of(straight)), "--checkpoint", "4", "--out", str(tmp_path / command), "--plain"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-m", "aegpo", *words],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        told = {"evaluate": "policy", "profile-entropy": "moved from base"}[command]
        assert f", {told}" in done.stdout
        assert any((tmp_path / command).iterdir())
