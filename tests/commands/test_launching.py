"""`aegpo run` for several runs: which are chosen, how they go on, and what is checked before the first one."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import sys
from contextlib import chdir
from pathlib import Path

import pytest
from command_line import Done, aegpo, start
from repository import ROOT

from aegpo.commands.launch_request import LaunchRequest
from aegpo.commands.run import launch, select_runs
from aegpo.config.loading import load_experiment_file
from aegpo.core.verdicts import VerdictSpec
from aegpo.errors import AegpoError
from aegpo.plugin.manager import load_registries, plugin_manager
from aegpo.runs.folders import Order, read_order

ABLATION = ROOT / "experiments" / "ablation.yaml"
TINY = """
name: tiny
training_steps: 3
seeds: [4]
model: shapes
prompts: {train_count: 2, evaluation_count: 4}
rollouts: {prompts_per_step: 2, rollouts_per_step: 4, denoising_steps: 3}
rewards: [palette]
allocator: uniform
selector: uniform
tree: independent
sampler: flow-sde
advantage: group
objective: clipped
evaluation: {every: 2, images: 2}
arms:
  grpo: {}
  plain: {optimizer: {weight_decay: 0}}
"""
# Keeps a run where it is as long as there is a file.
HOLD = """
import os
import time
import aegpo

@aegpo.hookimpl
def aegpo_on_step_end(run, report):
    while os.path.exists(os.environ["HELD"]):
        time.sleep(0.05)
"""
PATIENCE = 240  # seconds


@pytest.fixture(scope="module")
def ablation():
    return load_experiment_file(ABLATION, load_registries(plugin_manager()), ("seeds=[3, 1]",))


def chosen(file, **request):
    return [(run.arm, run.seed) for run in select_runs(file, LaunchRequest(ABLATION, **request))]


def test_runs_go_seed_by_seed_in_the_order_of_the_file(ablation):
    arms = list(ablation.arms)
    assert chosen(ablation) == [(arm, seed) for seed in (3, 1) for arm in arms]


def test_arms_and_seeds_can_be_chosen_and_keep_the_order_of_the_file(ablation):
    assert chosen(ablation, arms=("aegpo", "grpo", "grpo"), seeds=(1,)) == [("grpo", 1), ("aegpo", 1)]


def test_a_run_gets_its_own_seed_and_folder(ablation):
    run = select_runs(ablation, LaunchRequest(ABLATION, arms=("grpo",), seeds=(1,), out=Path("somewhere")))[0]
    assert run.experiment.seed == 1
    assert run.folder == Path("somewhere/ablation/grpo/seed-1")


def test_an_unknown_arm_is_an_error_with_the_nearest_name(ablation):
    with pytest.raises(AegpoError, match=r"ablation\.yaml has no arm 'gpro'; did you mean 'grpo'\?"):
        chosen(ablation, arms=("gpro",))


def test_an_unknown_seed_is_an_error_with_the_known_ones(ablation):
    with pytest.raises(AegpoError, match=r"has no seed 7; known: 3, 1; add it to 'seeds'"):
        chosen(ablation, seeds=(7,))


def test_the_command_to_go_on_is_the_same_command_but_never_starts_over():
    request = LaunchRequest(
        Path("my file.yaml"), ("a.b=1",), ("mine",), ("grpo",), (0, 1), Path("out"), jobs=2, fresh=True, report=False
    )
    line = "run 'my file.yaml' --arm grpo --seed 0 --seed 1 --set a.b=1 --plugin mine --out out --jobs 2 --no-report"
    assert shlex.join(request.command()) == line


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_weights):
    """A folder with both runs of the file, finished."""
    folder = tmp_path_factory.mktemp("launching")
    model = f"model: {{kind: shapes, weights: {tiny_weights}}}"
    (folder / "tiny.yaml").write_text(TINY.replace("model: shapes", model))
    with chdir(folder):
        for arm in ("grpo", "plain"):
            assert run("--arm", arm, "--no-report").code == 0
    return folder


def run(*words) -> Done:
    return aegpo("run", "tiny.yaml", "--out", "out", *words)


def finished(folder):
    return sorted(str(path.parent.relative_to(folder / "out" / "tiny")) for path in folder.rglob("finished.json"))


EVERY_RUN = ["grpo/seed-4", "plain/seed-4"]


def until(process, beginning):
    """What a process says, up to a line that begins so."""
    seen = []
    for line in process.stdout:
        seen.append(line)
        if line.startswith(beginning):
            return "".join(seen)
    raise AssertionError("".join(seen))


@pytest.mark.slow
def test_several_runs_can_be_interrupted_and_resumed_and_end_in_a_report(tmp_path, monkeypatch):
    (tmp_path / "tiny.yaml").write_text(TINY)
    (tmp_path / "hold.py").write_text(HOLD)
    held = tmp_path / "held"
    held.touch()
    words = ("run", "tiny.yaml", "--plugin", "hold.py", "--out", "out", "--jobs", "1")
    process = start(*words, folder=tmp_path, HELD=str(held))
    try:  # no run takes a second step before the command has heard Ctrl-C
        seen = until(process, "grpo seed 4: step")
        process.send_signal(signal.SIGINT)
        seen += until(process, "stopping: ")
    finally:
        held.unlink()
    output = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == 130, seen + output
    assert "interrupted; to go on:  aegpo run tiny.yaml --plugin hold.py --out out --jobs 1\n" in output
    assert EVERY_RUN[1] not in finished(tmp_path)
    log = (tmp_path / "out" / "tiny" / "grpo" / "seed-4" / "run.log").read_text()
    own = "run tiny.yaml --arm grpo --seed 4 --plugin hold.py --out out --no-report"
    assert log.startswith(f"--- {sys.executable} -m aegpo {own}\n")

    monkeypatch.chdir(tmp_path)
    done = run("--jobs", "2")
    assert done.code == 0, done.stdout + done.stderr
    assert finished(tmp_path) == EVERY_RUN
    assert read_order(tmp_path / "out" / "tiny") == Order(("grpo", "plain"), (4,))
    assert (tmp_path / "out" / "tiny" / "report.html").exists()


@pytest.mark.slow
def test_a_run_that_cannot_go_on_fails_alone_and_starting_over_mends_it(folder, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    broken, sound = (tmp_path / "out" / "tiny" / arm / "seed-4" for arm in ("grpo", "plain"))
    for each in (broken, sound):
        (each / "finished.json").unlink()
    for state in broken.glob("checkpoints/*/state.json"):
        state.unlink()
    done = run("--jobs", "1", "--no-report")
    assert done.code == 1, done.stdout + done.stderr
    assert "grpo seed 4: failed\n" in done.stdout
    assert "plain seed 4: finished\n" in done.stdout
    told = f"error: grpo seed 4 failed: exit code 2; the end of {Path('out/tiny/grpo/seed-4/run.log')}:\n"
    assert told in done.stderr
    assert "state.json is missing" in done.stderr
    done = run("--arm", "grpo", "--fresh", "--no-report")
    assert done.code == 0, done.stdout + done.stderr
    assert finished(tmp_path) == EVERY_RUN


def test_what_is_compared_may_change_when_runs_are_finished(folder, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    asked = {"comparisons": [["grpo", "plain"]], "margin": 0.1, "target": 0.9}
    done = run(*(word for key, value in asked.items() for word in ("--set", f"{key}={json.dumps(value)}")))
    assert done.code == 0, done.stdout + done.stderr
    assert "finished before, skipped" in done.stdout
    experiment = tmp_path / "out" / "tiny"
    assert read_order(experiment) == Order(("grpo", "plain"), (4,), VerdictSpec.model_validate(asked))
    numbers = json.loads((experiment / "report" / "summary.json").read_text())
    assert {(each["arm"], each["reference"]) for each in numbers["contrasts"]} == {("grpo", "plain")}


def test_every_run_is_checked_before_the_first_one_starts(folder, monkeypatch):
    monkeypatch.chdir(folder)
    before = finished(folder)
    assert before == EVERY_RUN
    with pytest.raises(AegpoError, match=r"(?s)grpo seed 4 was begun .*optimizer\.epsilon: 1e-08 -> 0\.5"):
        launch(LaunchRequest(Path("tiny.yaml"), overrides=("optimizer.epsilon=0.5",), out=Path("out")))
    assert finished(folder) == before


def test_an_out_folder_that_cannot_be_written_to_is_an_error(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(AegpoError, match=r"--out .*file: cannot be written to: .*; choose another folder"):
        launch(LaunchRequest(ABLATION, out=tmp_path / "file"))


def test_another_experiment_of_the_same_name_leaves_the_order_as_it_was(folder, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    before = (tmp_path / "out" / "tiny" / "order.json").read_bytes()
    done = run("--set", "optimizer.learning_rate=1e-9", "--set", "margin=0.5")
    assert done.code == 2
    assert "begun with another experiment" in done.stderr
    assert (tmp_path / "out" / "tiny" / "order.json").read_bytes() == before
