"""A run that is killed and started again must end as if nothing had happened, bit for bit."""

from __future__ import annotations

import shlex
import shutil
import signal
from contextlib import chdir

import pytest
import torch
from command_line import Done, aegpo, start
from exact_signals import LOADED, after, write_plugin
from safetensors.torch import load_file

from aegpo.runs.checkpoints import load_latest

EXPERIMENT = """
name: tiny
training_steps: 7
model: shapes
prompts: {train_count: 3, evaluation_count: 4}
rollouts: {prompts_per_step: 2, rollouts_per_step: 6, denoising_steps: 3}
rewards: [palette]
allocator: {kind: entropy, low: 2, high: 4}
selector: {kind: entropy-peak, top_k: 2}
tree: branching
sampler: flow-sde
advantage: group
objective: clipped
policy: {ema: 0.9}
optimizer: {rollouts_per_update: 3}
evaluation: {every: 2, images: 2}
checkpoint: {every: 2}
trackers: [console]
"""
# Kills its own run around the checkpoint of step 2: with the first of its files written, or amid the next step.
KILL = """
import os
import aegpo

def die(*_):
    os.kill(os.getpid(), 9)

@aegpo.hookimpl
def aegpo_on_step_end(run, report):
    if os.environ.get("KILL") == "writing" and report.step == 2:
        import safetensors.torch

        write = safetensors.torch.save_file

        def write_and_die(tensors, path):
            write(tensors, path)
            if path.parent.name == ".step-000002.tmp":
                die()

        safetensors.torch.save_file = write_and_die

@aegpo.hookimpl
def aegpo_on_checkpoint(run, step, path):
    if os.environ.get("KILL") == "amid" and step == 2:
        from torch.optim.optimizer import register_optimizer_step_post_hook

        register_optimizer_step_post_hook(die)
"""
PATIENCE = 240  # seconds


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    (folder / "tiny.yaml").write_text(EXPERIMENT)
    return folder


@pytest.fixture(scope="module")
def straight(folder):
    """The run folder of a run without a break."""
    done = run_here(folder, "straight")
    assert done.code == 0, done.stderr
    return run_folder(folder, "straight")


def command(out):
    return ("run", "tiny.yaml", "--out", out, "--no-report")


def run_here(folder, out, *words) -> Done:
    """The command to its end, in this process."""
    with chdir(folder):
        return aegpo(*(words or command(out)))


def run_folder(folder, out):
    return folder / out / "tiny" / "main" / "seed-0"


def steps(run):
    """Training steps recorded so far."""
    return (run / "metrics.jsonl").read_bytes().count(b"\n")


def broken_off(folder, words, code, **variables):
    """What a run in a process of its own says that the variables make end with this code."""
    process = start(*words, folder=folder, **variables)
    output = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == code, output
    return output


def assert_same_run(left, right):
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        assert (left / name).read_bytes() == (right / name).read_bytes(), name
    images = sorted(path.name for path in (left / "images").iterdir())
    assert images == sorted(path.name for path in (right / "images").iterdir())
    assert all((left / "images" / name).read_bytes() == (right / "images" / name).read_bytes() for name in images)
    one, other = (load_latest(each / "checkpoints", report=pytest.fail) for each in (left, right))
    assert one.step == other.step == 7
    assert one.state == other.state
    assert one.tensors.keys() == other.tensors.keys()
    assert {name.split("/")[0] for name in one.tensors} >= {"policy", "ema", "optimizer", "rng"}
    assert all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors)
    mine, yours = (base_entropies(each) for each in (left, right))
    assert mine.keys() == yours.keys()
    assert len(mine) == 3
    assert all(torch.equal(mine[prompt], yours[prompt]) for prompt in mine)


def base_entropies(run):
    """What the run's folder knows of the base policy, by prompt."""
    tables = [load_file(path) for path in (run / "signals").rglob("*.safetensors")]
    rows = ((prompt.numpy().tobytes(), row) for table in tables for prompt, row in zip(*table.values(), strict=True))
    return dict(rows)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_after_kills_at_four_points_and_an_interrupt_a_run_ends_as_if_nothing_had_happened(folder, straight):
    run = run_folder(folder, "killed")
    checkpoints = run / "checkpoints"
    write_plugin(folder)
    (folder / "kill.py").write_text(KILL)
    words = ("run", "tiny.yaml", *LOADED, "--plugin", "kill.py", "--out", "killed", "--no-report")

    broken_off(folder, words, -signal.SIGKILL, **after(1, signal.SIGKILL))  # before the first checkpoint
    assert steps(run) == 1
    assert not checkpoints.exists()

    broken_off(folder, words, -signal.SIGKILL, KILL="writing")  # while the first checkpoint is written
    assert steps(run) == 2
    assert [path.name for path in checkpoints.iterdir()] == [".step-000002.tmp"]
    assert len(list((checkpoints / ".step-000002.tmp").iterdir())) == 1

    broken_off(folder, words, -signal.SIGKILL, KILL="amid")  # in the middle of a step after a checkpoint
    assert steps(run) == 2
    assert load_latest(checkpoints, report=pytest.fail).step == 2

    output = broken_off(folder, words, 130, **after(3, signal.SIGINT))  # Ctrl-C between checkpoints
    line = next(line for line in output.splitlines() if line.startswith("interrupted; to go on:"))
    assert load_latest(checkpoints, report=pytest.fail).step == steps(run) == 3
    assert not (run / "finished.json").exists()

    with (run / "metrics.jsonl").open("ab") as file:  # a crash of the machine may leave half a row
        file.write(b'{"step": 4, "metr')
    told = shlex.split(line.removeprefix("interrupted; to go on:"))
    assert told == ["aegpo", *words]
    done = run_here(folder, "killed", *told[1:])
    assert done.code == 0, done.stderr
    assert_same_run(run, straight)


def test_a_damaged_checkpoint_costs_steps_but_changes_nothing(folder, straight):
    run = run_folder(folder, "damaged")
    shutil.copytree(straight, run)
    (run / "finished.json").unlink()
    (run / "images" / "step-000007.png").unlink()
    (run / "checkpoints" / "step-000007" / "optimizer.safetensors").write_bytes(b"")
    done = run_here(folder, "damaged")
    assert done.code == 0, done.stderr
    assert "step-000007: optimizer.safetensors has a wrong checksum" in done.stdout
    assert "step 7/7" in done.stdout
    assert_same_run(run, straight)


def test_a_finished_run_is_skipped_and_a_changed_one_refused(folder, straight):
    before = {path: path.stat().st_mtime_ns for path in straight.rglob("*.json*")}
    done = run_here(folder, "straight")
    assert done.code == 0, done.stderr
    assert "main seed 0: finished before, skipped (--fresh starts over)" in done.stdout
    done = run_here(folder, "straight", "run", "tiny.yaml", "--out", "straight", "--set", "optimizer.epsilon=0.5")
    assert done.code == 2, done.stderr
    assert "  optimizer.epsilon: 1e-08 -> 0.5\n" in done.stderr
    assert {path: path.stat().st_mtime_ns for path in straight.rglob("*.json*")} == before
