"""A run whose server is killed loses nothing: it ends with its state saved, and goes on bit for bit."""

from __future__ import annotations

import signal
from contextlib import chdir

import pytest
import torch
from command_line import Done, aegpo, start
from exact_signals import LOADED, after, write_plugin
from test_remote import PATIENCE, serve

from aegpo.runs.checkpoints import load_latest

EXPERIMENT = """
name: remote
training_steps: 6
model: {kind: shapes, weights: WEIGHTS}
prompts: {train_count: 3, evaluation_count: 4}
rollouts: {prompts_per_step: 2, rollouts_per_step: 6, denoising_steps: 3, micro_batch: 2}
rewards:
  - {kind: remote, name: far, url: URL, retries: 1, backoff: 0.05, micro_batch: 2}
  - {kind: palette, weight: 0.5}
allocator: {kind: entropy, low: 2, high: 4}
selector: uniform
tree: independent
sampler: flow-sde
advantage: group
objective: clipped
evaluation: {every: 3, images: 2}
checkpoint: {every: 4}
"""


def command(out: str) -> tuple[str, ...]:
    return ("run", "remote.yaml", "--out", out, "--no-report")


def run_here(folder, out: str) -> Done:
    """The command to its end, in this process."""
    with chdir(folder):
        return aegpo(*command(out))


def rows(folder, out: str, name: str) -> bytes:
    path = folder / out / "remote" / "main" / "seed-0" / name
    return path.read_bytes() if path.exists() else b""


def stop(process) -> None:
    process.kill()
    process.wait(PATIENCE)
    process.stdout.close()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_run_whose_server_is_killed_goes_on_as_if_it_had_not_been(tmp_path, tiny_weights):
    server, url = serve("palette", "--port", "0")
    text = EXPERIMENT.replace("URL", url).replace("WEIGHTS", str(tiny_weights))
    (tmp_path / "remote.yaml").write_text(text)
    straight = run_here(tmp_path, "straight")
    assert straight.code == 0, straight.stderr

    write_plugin(tmp_path)
    broken = start(*command("broken"), *LOADED, folder=tmp_path, **after(2, signal.SIGKILL, server.pid))
    output = broken.communicate(timeout=PATIENCE)[0]
    stop(server)
    assert broken.returncode == 2, output
    assert "Traceback" not in output
    assert f"error: reward 'far': {url}/score could not be asked in 2 attempts: ConnectionError" in output
    assert "and all before it are saved; the same command goes on from there" in output
    checkpoint = load_latest(tmp_path / "broken" / "remote" / "main" / "seed-0" / "checkpoints")
    assert checkpoint is not None
    assert rows(tmp_path, "broken", "metrics.jsonl").count(b"\n") == checkpoint.step == 2

    again = run_here(tmp_path, "broken")
    assert "/health could not be asked in 2 attempts" in again.stderr
    assert again.code == 2
    server, _ = serve("palette", "--port", url.rsplit(":", 1)[1])
    again = run_here(tmp_path, "broken")
    assert again.code == 0, again.stderr
    stop(server)
    for name in ("metrics.jsonl", "evaluations.jsonl", "images/step-000006.png"):
        assert rows(tmp_path, "broken", name) == rows(tmp_path, "straight", name) != b"", name
    folders = [tmp_path / out / "remote" / "main" / "seed-0" / "checkpoints" for out in ("straight", "broken")]
    ends = [load_latest(folder) for folder in folders]
    assert ends[0].tensors.keys() == ends[1].tensors.keys()
    assert all(torch.equal(tensor, ends[1].tensors[name]) for name, tensor in ends[0].tensors.items())
    far, near = ([row.split(f'"reward/{name}": ')[1].split(",")[0] for row in first(tmp_path)] for name in LABELS)
    assert far == near


LABELS = ("far", "palette")


def first(folder) -> list[str]:
    return rows(folder, "straight", "metrics.jsonl").decode().splitlines()
