"""A run that gets more training steps ends as one that had them from the start, bit for bit; or it is refused."""

from __future__ import annotations

import json
import signal
from contextlib import chdir
from pathlib import Path

import pytest
import torch
from command_line import Done, aegpo, start
from exact_signals import LOADED, after, write_plugin
from safetensors.torch import load_file

from aegpo.report.recorded_run import read_run
from aegpo.runs.checkpoints import load_latest

EXPERIMENT = """
name: tiny
training_steps: {steps}
device: cpu
model: shapes
prompts: {{train_count: 6, evaluation_count: 4}}
rollouts: {{prompts_per_step: 2, rollouts_per_step: 6, denoising_steps: 3}}
rewards: [palette]
allocator: {{kind: entropy, low: 2, high: 4}}
selector: {{kind: entropy-peak, top_k: 2}}
tree: branching
sampler: flow-sde
advantage: running
objective: clipped
policy: {{ema: 0.9}}
optimizer: {{rollouts_per_update: 3, schedule: {{kind: constant, warmup: 5}}}}
evaluation: {{every: 3, images: 2}}
checkpoint: {{every: 9}}
"""
RUN = Path("tiny/main/seed-0")
ONCE_LAST = "main seed 0: the evaluation after step {step}, once the last, is taken out: 'evaluation.every' is 3, and"
PATIENCE = 240  # seconds


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("longer")


@pytest.fixture(scope="module")
def straight(folder) -> Path:
    """A run of eight steps without a break."""
    assert train(folder, "straight", 8).code == 0
    return folder / "straight" / RUN


def train(folder: Path, out: str, steps: int, *more: str) -> Done:
    (folder / "tiny.yaml").write_text(EXPERIMENT.format(steps=steps))
    with chdir(folder):
        return aegpo("run", "tiny.yaml", "--out", out, "--no-report", *more)


def assert_same_run(left: Path, right: Path) -> None:
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        assert (left / name).read_bytes() == (right / name).read_bytes(), name
    images = sorted(path.name for path in (left / "images").iterdir())
    assert images == sorted(path.name for path in (right / "images").iterdir())
    assert all((left / "images" / name).read_bytes() == (right / "images" / name).read_bytes() for name in images)
    one, other = (load_latest(each / "checkpoints", report=pytest.fail) for each in (left, right))
    assert (one.step, one.state, one.records) == (other.step, other.state, other.records)
    assert one.tensors.keys() == other.tensors.keys()
    assert {name.split("/")[0] for name in one.tensors} >= {"policy", "ema", "optimizer", "rng"}
    assert one.state["parts"]["advantage"]
    assert all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors)
    mine, yours = (base_entropies(each) for each in (left, right))
    assert mine
    assert mine.keys() == yours.keys()
    assert all(torch.equal(mine[prompt], yours[prompt]) for prompt in mine)


def base_entropies(run: Path) -> dict[bytes, torch.Tensor]:
    """What the run's folder knows of the base policy, by prompt."""
    tables = [load_file(path) for path in (run / "signals").rglob("*.safetensors")]
    rows = ((prompt.numpy().tobytes(), row) for table in tables for prompt, row in zip(*table.values(), strict=True))
    return dict(rows)


def timed(run: Path) -> list[tuple[int, bool]]:
    rows = [json.loads(line) for line in (run / "timing.jsonl").read_text().splitlines()]
    return [(row["step"], "evaluation" in row["seconds"]) for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize("begun", [[6], [5], [2, 4]], ids=["evaluated there anyway", "not evaluated there", "twice"])
def test_a_run_that_gets_more_steps_ends_as_one_that_had_them_from_the_start(folder, straight, begun):
    out = "-".join(map(str, begun))
    run = folder / out / RUN
    for number, steps in enumerate((*begun, 8)):
        done = train(folder, out, steps)
        assert done.code == 0, done.stderr
        assert json.loads((run / "finished.json").read_text())["step"] == steps
        evaluated = [json.loads(line)["step"] for line in (run / "evaluations.jsonl").read_text().splitlines()]
        assert evaluated == [step for step in range(steps + 1) if step % 3 == 0 or step == steps]
        before = begun[number - 1] if number else None
        assert ("goes on with more training steps than it was to make" in done.stdout) is (before is not None)
        taken_out = before is not None and before % 3 != 0
        assert (ONCE_LAST.format(step=before) in done.stdout) is taken_out
    assert_same_run(run, straight)
    assert timed(run) == timed(straight)
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["experiment"]["training_steps"] == 8
    assert [each["to"] for each in manifest["training_steps_raised"]] == [*begun[1:], 8]
    assert read_run("main", 0, run).finished
    assert "finished before, skipped" in train(folder, out, 8).stdout


@pytest.mark.slow
def test_a_run_that_got_more_steps_and_is_killed_goes_on_as_any_other(folder, straight):
    assert train(folder, "killed", 5).code == 0
    run = folder / "killed" / RUN
    (folder / "tiny.yaml").write_text(EXPERIMENT.format(steps=8))
    write_plugin(folder)
    words = ("run", "tiny.yaml", *LOADED, "--out", "killed", "--no-report")
    process = start(*words, folder=folder, **after(6, signal.SIGKILL))  # the newest checkpoint is that of step 5
    output = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == -signal.SIGKILL, output
    assert not (run / "finished.json").exists()
    assert read_run("main", 0, run).steps_done == 6  # its record is whole for the report, too
    done = train(folder, "killed", 8)
    assert done.code == 0, done.stderr
    assert_same_run(run, straight)


@pytest.mark.slow
def test_a_run_that_is_not_finished_may_get_more_steps_too(folder, straight):
    assert train(folder, "stopped", 6).code == 0
    (folder / "stopped" / RUN / "finished.json").unlink()
    assert train(folder, "stopped", 8).code == 0
    assert_same_run(folder / "stopped" / RUN, straight)


def test_fewer_steps_and_a_rate_that_falls_over_all_steps_are_refused_with_the_reason(folder, straight):
    done = train(folder, "straight", 6)
    assert done.code == 2
    assert "training_steps: 8 -> 6 (a run gets more steps, not fewer; stop it where it is enough)" in done.stderr
    falling = ("--set", "optimizer.schedule={kind: cosine}")
    assert train(folder, "falling", 2, *falling).code == 0
    done = train(folder, "falling", 4, *falling)
    assert done.code == 2
    assert (
        "  training_steps: 2 -> 4 ('optimizer.schedule: cosine' lowers the learning rate over all steps, so those that "
        "are done had another rate than in a longer run)\n"
    ) in done.stderr
    done = train(folder, "straight", 9, "--set", "optimizer.learning_rate=0.1")
    assert done.code == 2
    assert "training_steps" not in done.stderr
    assert "optimizer.learning_rate: 0.0003 -> 0.1" in done.stderr
    assert json.loads((straight / "manifest.json").read_text())["experiment"]["training_steps"] == 8


def test_a_number_of_steps_that_the_file_leaves_out_is_not_taken_for_more(folder):
    assert train(folder, "left-out", 2).code == 0
    (folder / "bare.yaml").write_text(EXPERIMENT.format(steps=2).replace("training_steps: 2\n", ""))
    with chdir(folder):
        done = aegpo("run", "bare.yaml", "--out", "left-out", "--no-report")
    assert done.code == 2
    assert "training_steps: 2 -> 40 (the file does not set it, and its default is this now;" in done.stderr
