"""Observers cannot harm a run: one that fails stops it with its state saved, or is dropped, told and noted."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Literal

import pytest
from worlds import GaussianSpec, restore, run_loop, small_experiment

import aegpo
from aegpo.core.experiment import EvaluationSpec
from aegpo.core.sections import CheckpointSpec
from aegpo.errors import CheckpointError, ObserverError, PluginError
from aegpo.plugin.manager import plugin_manager
from aegpo.runs import checkpoints
from aegpo.runs.loop import owes_evaluation
from aegpo.runs.observers import Observers, read_dropped
from aegpo.runs.trackers import JsonlTracker
from aegpo.train.engine import Engine

EVENTS = ("aegpo_on_run_start", "aegpo_on_evaluation", "aegpo_on_step_end", "aegpo_on_checkpoint", "aegpo_on_run_end")
TRAINING = small_experiment(
    GaussianSpec(), training_steps=3, evaluation=EvaluationSpec(every=2), checkpoint=CheckpointSpec(every=3)
)


class Fragile:
    """Fails at one event, from a training step on, as often as it is told to."""

    def __init__(self, event: str, step: int = 0, times: int = 1, on_error: str = "stop") -> None:
        self.event, self.step, self.times, self.on_error, self.heard = event, step, times, on_error, []

    def hear(self, event: str, step: int) -> None:
        self.heard.append((event, step))
        if event == self.event and step >= self.step and self.times > 0:
            self.times -= 1
            raise ConnectionError("no route to host")

    @aegpo.hookimpl
    def aegpo_on_run_start(self, run):
        self.hear("aegpo_on_run_start", run.first_step)

    @aegpo.hookimpl
    def aegpo_on_step_end(self, run, report):
        self.hear("aegpo_on_step_end", report.step)

    @aegpo.hookimpl
    def aegpo_on_evaluation(self, run, step, evaluation):
        self.hear("aegpo_on_evaluation", step)

    @aegpo.hookimpl
    def aegpo_on_checkpoint(self, run, step, path):
        self.hear("aegpo_on_checkpoint", step)

    @aegpo.hookimpl
    def aegpo_on_run_end(self, run, outcome):
        self.hear("aegpo_on_run_end", run.training_steps)


def train(folder, fragile, said=None):
    """A run with a record and an observer that fails, from its newest checkpoint if there is one."""
    folder.mkdir(exist_ok=True)
    engine = Engine.build(TRAINING)
    observers = {"tracker 'jsonl'": JsonlTracker().build(folder), "tracker 'fragile'": fragile}
    return run_loop(engine, folder, observers, say=(said if said is not None else []).append)


def record(folder):
    """Everything deterministic that a run wrote."""
    names = ("metrics.jsonl", "evaluations.jsonl", "images/step-000000.png", "images/step-000003.png")
    return {name: (folder / name).read_bytes() for name in names}


class Scribbler:
    """Writes into all that it is shown."""

    @aegpo.hookimpl
    def aegpo_on_step_end(self, run, report):
        report.counts[:], report.selected[:] = 0, False
        report.metrics.clear()
        report.seconds.clear()

    @aegpo.hookimpl
    def aegpo_on_evaluation(self, run, step, evaluation):
        evaluation.images.zero_()
        for scores in evaluation.scores.values():
            scores[:] = 3
        evaluation.scores.clear()


class Leaver:
    """Ends the program."""

    @aegpo.hookimpl
    def aegpo_on_step_end(self, run, report):
        sys.exit(0)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert train(folder, Fragile("never")) == "finished"
    return record(folder)


# Of 3 steps with evaluations before, after 2 and after 3, and a checkpoint after 3: what is saved when it fails there.
@pytest.mark.parametrize(
    ("event", "step", "saved"),
    [
        ("aegpo_on_run_start", 0, None),
        ("aegpo_on_evaluation", 0, None),
        ("aegpo_on_step_end", 1, 1),
        ("aegpo_on_step_end", 2, 2),
        ("aegpo_on_evaluation", 1, 2),
        ("aegpo_on_evaluation", 3, 3),
        ("aegpo_on_checkpoint", 3, 3),
        ("aegpo_on_run_end", 3, 3),
    ],
)
def test_an_observer_that_stops_a_run_is_blamed_and_costs_nothing(tmp_path, whole, event, step, saved):
    fragile = Fragile(event, step)
    with pytest.raises(ObserverError) as error:
        train(tmp_path, fragile)
    told = str(error.value)
    assert told.startswith(f"tracker 'fragile' failed with ConnectionError: no route to host (in {event})")
    assert isinstance(error.value.__cause__, ConnectionError)
    newest = checkpoints.load_latest(tmp_path / "checkpoints")
    assert (newest and newest.step) == saved
    if event != "aegpo_on_run_start":
        kept = "nothing was learned yet" if saved is None else f"step {saved} and all before it are saved"
        assert told.endswith(f"\n{kept}; the same command goes on from there")
    assert train(tmp_path, fragile) == "finished"
    assert record(tmp_path) == whole


def test_a_run_whose_end_could_not_be_told_only_tells_it_again(tmp_path):
    fragile = Fragile("aegpo_on_run_end", times=2)
    for _ in range(2):
        with pytest.raises(ObserverError, match="aegpo_on_run_end"):
            train(tmp_path, fragile)
        fragile.heard.clear()
    assert train(tmp_path, fragile) == "finished"
    assert fragile.heard == [("aegpo_on_run_start", 3), ("aegpo_on_run_end", 3)]


@pytest.mark.parametrize("event", EVENTS)
def test_an_observer_that_may_be_dropped_is_told_of_once_and_noted(tmp_path, whole, event):
    fragile, said = Fragile(event, times=99, on_error="drop"), []
    assert train(tmp_path, fragile, said) == "finished"
    assert record(tmp_path) == whole
    assert said == ["tracker 'fragile' failed with ConnectionError: no route to host; the run goes on without it"]
    assert [name for name, _ in fragile.heard].count(event) == 1
    assert fragile.heard[-1][0] == event  # nothing is told it after that
    (dropped,) = read_dropped(tmp_path)
    assert (dropped.observer, dropped.event) == ("tracker 'fragile'", event)
    assert dropped.error == "ConnectionError: no route to host"


def test_an_observer_that_writes_into_what_it_is_shown_changes_nothing_for_the_others(tmp_path, whole):
    engine = Engine.build(TRAINING)
    observers = {"tracker 'a'": Scribbler(), "tracker 'jsonl'": JsonlTracker().build(tmp_path)}
    assert run_loop(engine, tmp_path, {**observers, "tracker 'b'": Scribbler()}) == "finished"
    assert record(tmp_path) == whole


def test_an_observer_that_ends_the_program_has_failed(tmp_path):
    with pytest.raises(ObserverError, match="tracker 'fragile' failed with SystemExit: 0") as caught:
        train(tmp_path, Leaver())
    assert caught.value.part == ("tracker", "fragile")


def test_the_others_are_told_before_the_run_ends(tmp_path):
    with pytest.raises(ObserverError):
        train(tmp_path, Fragile("aegpo_on_step_end", 2))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]


def test_a_step_that_the_record_lacks_is_not_saved(tmp_path):
    class Forgetful(Fragile):
        """A record that cannot be written."""

    engine, forgetful = Engine.build(TRAINING), Forgetful("aegpo_on_step_end", 2)
    info = run_info(tmp_path)
    observers = Observers(plugin_manager(), info, print)
    observers.add("tracker 'jsonl'", forgetful, "stop", record=True)
    from aegpo.runs.loop import Loop

    with pytest.raises(ObserverError, match="nothing was learned yet"):
        Loop(engine, info, observers).run(lambda: False)
    assert checkpoints.steps_in(tmp_path / "checkpoints") == ()


def run_info(folder):
    from aegpo.runs.folders import Run

    return Run("arm", 0, TRAINING, folder).info(0, owes_evaluation=True)


def test_a_declaration_that_is_neither_is_refused_by_name(tmp_path):
    with pytest.raises(PluginError, match=r"tracker 'fragile' declares 'on_error' as 'ignore'; it is 'stop' or 'drop'"):
        train(tmp_path, Fragile("never", on_error="ignore"))


def test_two_observers_of_one_name_are_told_apart(tmp_path):
    observers = Observers(plugin_manager(), run_info(tmp_path), print)
    first, second = Fragile("aegpo_on_run_start"), Fragile("aegpo_on_run_start")
    observers.add("tracker 'fragile'", first)
    observers.add("tracker 'fragile'", second)
    with pytest.raises(ObserverError, match=r"^tracker 'fragile' \(2\) failed"):
        observers.started()
    assert first.heard == second.heard == [("aegpo_on_run_start", 0)]


def test_the_record_of_a_run_is_never_dropped():
    with pytest.raises(ValueError, match="'stop'"):
        JsonlTracker(on_error="drop")


class Dropping(aegpo.TrackerSpec):
    """A tracker that talks to a network."""

    kind: Literal["dropping"] = "dropping"
    on_error: Literal["stop", "drop"] = "drop"

    def build(self, folder):
        return Fragile("aegpo_on_step_end", times=99)


def test_a_file_may_overrule_what_a_tracker_declares(tmp_path):
    for spec, ends in ((Dropping(), None), (Dropping(on_error="stop"), ObserverError)):
        observers = Observers(plugin_manager(), run_info(tmp_path), lambda line: None)
        observers.add("tracker 'dropping'", spec.build(tmp_path), spec.on_error)
        report = Engine.build(TRAINING).step(1)
        if ends is None:
            observers.stepped(report)
        else:
            with pytest.raises(ends):
                observers.stepped(report)


def test_a_step_that_an_older_version_left_half_reported_is_refused_with_ways_out(tmp_path):
    train(tmp_path, Fragile("never"))
    checkpoint = checkpoints.load_latest(tmp_path / "checkpoints")
    restore(Engine.build(TRAINING), checkpoint)
    assert owes_evaluation(checkpoint) is False
    checkpoint.state["unreported"] = {"step": 4}
    with pytest.raises(CheckpointError, match=r"step 3 holds a step more.*go on with aegpo 0\.1.*--fresh"):
        owes_evaluation(checkpoint)


FAR = '''
from typing import Literal
import aegpo

class Far(aegpo.TrackerSpec):
    """Talks to a network that is not there."""
    kind: Literal["far"] = "far"

    def build(self, folder):
        return Observer()

class Observer:
    @aegpo.hookimpl
    def aegpo_on_step_end(self, run, report):
        raise ConnectionError("no route to host")

@aegpo.hookimpl
def aegpo_register_trackers(registry):
    registry.add(Far)
'''


@pytest.mark.slow
def test_on_the_command_line_its_author_gets_the_place_and_the_user_a_line(tmp_path, tiny_weights):
    (tmp_path / "far.py").write_text(FAR)
    text = f"model: {{kind: shapes, weights: {tiny_weights}}}\nrewards: [palette]\ntraining_steps: 1\n"
    text += "prompts: {train_count: 8, evaluation_count: 4}\ntrackers: [far]\n"
    text += "rollouts: {prompts_per_step: 2, rollouts_per_step: 8, denoising_steps: 4}\n"
    (tmp_path / "x.yaml").write_text(text)
    words = [sys.executable, "-m", "aegpo", "run", "x.yaml", "--plugin", "far.py"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert 'raise ConnectionError("no route to host")' in done.stderr
    assert done.stderr.splitlines()[-2:] == [
        "error: tracker 'far' failed with ConnectionError: no route to host (in aegpo_on_step_end) (shipped by far.py)",
        "step 1 and all before it are saved; the same command goes on from there",
    ]
