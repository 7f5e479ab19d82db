"""The tracker `accelerate`: what a service is told, that it is told once, and that a run stays as it was."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from contextlib import chdir
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import tracking
from command_line import aegpo
from PIL import Image
from pydantic import ValidationError

from aegpo.core.records import Prompt, Signal
from aegpo.core.reports import Evaluation, RunInfo, StepReport
from aegpo.errors import AegpoError
from aegpo.runs.tracking import AccelerateTracker, panels
from aegpo.runs.tracking.apart import apart
from aegpo.runs.tracking.numbers import evaluation_numbers, flat, step_numbers

TINY = """
name: tiny
about: What this arm does.
training_steps: 4
model: shapes
prompts: {train_count: 3, evaluation_count: 4}
rollouts: {prompts_per_step: 2, rollouts_per_step: 6, denoising_steps: 3}
rewards: [palette]
allocator: {kind: entropy, low: 2, high: 4}
selector: {kind: entropy-peak, top_k: 2}
tree: branching
sampler: flow-sde
objective: clipped
optimizer: {rollouts_per_update: 3}
evaluation: {every: 2, images: 2}
checkpoint: {every: 2}
"""


class FileTracker(tracking.GeneralTracker):
    """A service that is a file: a line for each thing it is told."""

    name = "file"
    requires_logging_directory = True

    def __init__(self, project, logging_dir, refuses=None, **options):
        super().__init__()
        self.project, self.refuses, self.options = project, refuses, options
        self.path = Path(logging_dir) / "told.jsonl"

    @property
    def tracker(self):
        return self

    def start(self):
        if self.refuses == "start":
            raise ConnectionError("no route\nto the service")
        random.random(), np.random.random(), torch.rand(1)  # a client may draw
        tracking.logger.debug("accelerate's own trackers log, which needs a state")
        self._tell("start", project=self.project, options=self.options)

    def store_init_configuration(self, values):
        self._tell("config", values=values)

    def log(self, values, step=None):
        if self.refuses == step:
            raise ConnectionError("gone")
        self._tell("log", step=step, values=values)

    def log_images(self, values, step=None):
        self._tell("images", step=step, sizes={name: [each.size for each in shown] for name, shown in values.items()})

    def finish(self):
        self._tell("finish")

    def _tell(self, what, **told):
        with self.path.open("a") as file:
            file.write(json.dumps({"what": what, **told}) + "\n")


@pytest.fixture
def file_service(monkeypatch):
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "file", FileTracker)


def told(folder, what):
    lines = (folder / "tracking" / "told.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["what"] == what]


# --- names and formulas ----------------------------------------------------------------------------------------------


def a_report(step=1):
    metrics = {"reward": 0.5, "reward_std": 0.25, "reward/scene": 0.75, "ratio": 1.5, "clipped": 0.125, "kl": 0.01}
    selected = np.array([[True, False, True], [False, False, True]])
    entropy = np.array([[1.0, np.nan, 3.0], [2.0, np.nan, 6.0]])
    signals = {
        "entropy": Signal("prompt-step", entropy),
        "step-noise": Signal("step", np.array([1.0, 2.0, 6.0])),
        "delta": Signal("prompt", np.array([0.25, np.nan])),
    }
    prompts, counts = (Prompt(5, "a red circle"), Prompt(2, "two squares")), np.array([2, 4])
    seconds, unrecorded = {"rollout": 1.0, "update": 0.5}, {"zero_std_ratio": 0.5, "ratio_std": 0.1}
    return StepReport(step, metrics, prompts, counts, selected, signals, seconds, unrecorded)


def test_a_step_has_the_names_that_others_log_beside_ours():
    found = step_numbers(a_report())
    assert {name: found[name] for name in ("reward", "reward_std", "ratio", "clipped", "kl")} == {
        "reward": 0.5,
        "reward_std": 0.25,
        "ratio": 1.5,
        "clipped": 0.125,
        "kl": 0.01,
    }
    assert (found["reward_scene"], found["reward_std_mean"], found["zero_std_ratio"]) == (0.75, 0.25, 0.5)
    assert (found["ratio_mean"], found["ratio_std"]) == (1.5, 0.1)
    assert (found["clipfrac"], found["kl_loss"]) == (0.125, 0.01)
    assert found["images_per_second"] == 6 / 1.5
    assert found["seconds/rollout"] == 1.0
    assert "approx_kl" not in found  # no objective reported it


def test_a_step_says_what_allocator_and_selector_decided_and_by_which_signals():
    found = step_numbers(a_report())
    assert [found[f"rollouts_per_prompt/{name}"] for name in ("min", "mean", "max")] == [2, 3, 4]
    assert [found[f"chosen_steps/share_{step}"] for step in range(3)] == [0.5, 0.0, 1.0]
    assert found["chosen_steps/per_prompt"] == 1.5
    assert found["signal/entropy/mean"] == 3.0
    assert (found["signal/entropy/step_0"], found["signal/entropy/step_2"]) == (1.5, 4.5)
    assert "signal/entropy/step_1" not in found  # nobody measured it
    assert found["signal/step-noise/step_2"] == 6.0
    assert {name for name in found if name.startswith("signal/delta")} == {"signal/delta/mean"}
    assert found["signal/delta/mean"] == 0.25


def test_no_name_is_a_folder_of_another_for_services_that_keep_a_file_a_name():
    found = step_numbers(a_report()) | evaluation_numbers(an_evaluation(0))
    assert not [name for name in found for other in found if other.startswith(f"{name}/")]


def an_evaluation(step):
    base = np.array([0.5, 0.25])
    images = torch.linspace(0, 1, 2 * 3 * 24 * 24).reshape(2, 3, 24, 24) * (1 - step / 8)
    return Evaluation(("a red circle", "two squares"), {"scene": base + step / 8}, {"scene": base}, images, 1.5)


def test_an_evaluation_has_the_policys_mean_the_bases_and_the_gain():
    assert evaluation_numbers(an_evaluation(2)) == {
        "evaluation/scene": 0.625,
        "evaluation_base/scene": 0.375,
        "evaluation_gain/scene": 0.25,
        "seconds/evaluation": 1.5,
    }


def test_options_are_told_by_dotted_keys():
    nested = {"name": "x", "model": {"kind": "shapes", "scale": None}, "rewards": [{"kind": "a"}], "seeds": [0, 1]}
    assert flat(nested) == {
        "name": "x",
        "model.kind": "shapes",
        "model.scale": "null",
        "rewards.0.kind": "a",
        "seeds": "0, 1",
    }


# --- panels ----------------------------------------------------------------------------------------------------------


def test_a_panel_shows_the_base_left_of_the_policy_and_says_both_scores():
    base, after = an_evaluation(0), an_evaluation(4)
    shown = panels.panels(after, panels.pictures(base.images))
    assert [each.caption for each in shown] == [
        "a red circle (base | policy; scene 0.500 -> 1.000)",
        "two squares (base | policy; scene 0.250 -> 0.750)",
    ]
    pixels = np.asarray(shown[1].picture)
    assert pixels.shape == (96, 96 + 4 + 96, 3)
    assert (pixels[:, :96] == np.asarray(panels.pictures(base.images)[1])).all()
    assert (pixels[:, 100:] == np.asarray(panels.pictures(after.images)[1])).all()
    assert (pixels[:, 96:100] == 128).all()


def test_where_the_bases_image_is_gone_a_panel_shows_the_policy_alone_and_says_so(tmp_path):
    panels.keep(panels.pictures(an_evaluation(0).images), tmp_path)
    assert len(panels.kept(tmp_path)) == 2
    (tmp_path / "base-1.png").write_bytes((tmp_path / "base-1.png").read_bytes()[:40])
    first, second = panels.panels(an_evaluation(4), panels.kept(tmp_path))
    assert first.picture.size == (196, 96)
    assert (second.picture.size, second.caption[:27]) == ((96, 96), "two squares (policy alone; ")


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"log_with": "wanbd"}, "accelerate has no tracker 'wanbd'; did you mean 'wandb'?"),
        ({"log_with": "tensorboard"}, "write the tracker 'tensorboard'"),
        ({"log_with": "wandb", "init": {"api_key": "x"}}, "'api_key' is refused, since a secret would be recorded"),
        ({"log_with": "wandb", "init": {"settings": {"api_token": "x"}}}, "'settings.api_token' is refused"),
        ({"log_with": "trackio", "init": {"server_url": "http://h/?write_token=x"}}, "'server_url' is refused"),
        ({"log_with": "mlflow", "init": {"uri": "http://me:secret@h"}}, "'uri' is refused"),
    ],
)
def test_slips_and_secrets_are_refused_when_the_file_is_read(options, message):
    with pytest.raises(ValidationError) as caught:
        AccelerateTracker(**options)
    assert message in str(caught.value)


def test_a_missing_package_is_one_line_with_the_command_that_installs_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(AegpoError, match=r'log_with \'wandb\' needs .*pip install "aegpo\[wandb\]"  or take') as caught:
        AccelerateTracker(log_with="wandb").build(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_tracker_that_accelerate_does_not_know_is_refused_with_those_it_knows(tmp_path):
    with pytest.raises(AegpoError, match=r"no tracker 'house-made'; known: aim, .*register_tracker_class"):
        AccelerateTracker(log_with="house-made").build(tmp_path)


def test_a_service_that_cannot_be_reached_is_one_line_before_anything_else(tmp_path, file_service):
    observer = AccelerateTracker(log_with="file", init={"refuses": "start"}).build(tmp_path)
    with pytest.raises(AegpoError) as caught:
        observer.aegpo_on_run_start(RunInfo("grpo", 3, tmp_path, 0, 4))
    assert str(caught.value) == (
        "file did not begin the run: no route to the service; mend that, or set 'on_error: drop' to go on without it"
    )
    observer.aegpo_on_run_end(RunInfo("grpo", 3, tmp_path, 0, 4), "failed")  # which has nothing to end


def test_the_spec_imports_neither_torch_nor_accelerate():
    code = "import sys, aegpo.runs.tracking; print([n for n in ('torch', 'accelerate', 'PIL') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# --- apart -----------------------------------------------------------------------------------------------------------


def test_what_a_client_draws_is_given_back_and_a_launchers_words_are_not_heard(monkeypatch):
    from accelerate.state import PartialState

    launched = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    with apart():
        random.random(), np.random.random(), torch.rand(1)
        assert PartialState().num_processes == 1
        assert os.environ["WORLD_SIZE"] == "2"
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
    assert not PartialState._shared_state
    assert not torch.distributed.is_initialized()


# --- whole runs ------------------------------------------------------------------------------------------------------


def run_tiny(folder, out, trackers, *more):
    (folder / "tiny.yaml").write_text(TINY)
    with chdir(folder):
        done = aegpo("run", "tiny.yaml", "--out", out, "--no-report", "--set", f"trackers=[{trackers}]", *more)
    return done, folder / out / "tiny" / "main" / "seed-0"


FILE = "{kind: accelerate, log_with: file, tags: [a]}"


def test_a_run_with_a_service_has_the_bytes_of_one_without(tmp_path, file_service):
    (_, plain), (done, tracked) = run_tiny(tmp_path, "plain", ""), run_tiny(tmp_path, "tracked", FILE)
    assert done.code == 0, done.stderr
    for name in ("metrics.jsonl", "evaluations.jsonl", "checkpoints/step-000004/policy.safetensors"):
        assert (tracked / name).read_bytes() == (plain / name).read_bytes()
    assert told(tracked, "start") == [{"what": "start", "project": "tiny", "options": {}}]
    assert told(tracked, "config")[0]["values"]["about"] == "What this arm does."
    assert [row["step"] for row in told(tracked, "log")] == [0, 1, 2, 2, 3, 4, 4]
    assert [row["sizes"] for row in told(tracked, "images")] == [{"evaluation": [[196, 96]] * 2}] * 3
    assert len(told(tracked, "finish")) == 1
    assert "accelerate" not in (tracked / "metrics.jsonl").read_text()


def test_what_the_record_leaves_out_follows_from_the_step(tmp_path, file_service):
    _, tracked = run_tiny(tmp_path, "out", FILE)
    steps = [row["values"] for row in told(tracked, "log") if "loss" in row["values"]]
    recorded = [json.loads(line)["metrics"] for line in (tracked / "metrics.jsonl").read_text().splitlines()]
    for values, metrics in zip(steps, recorded, strict=True):
        assert values["zero_std_ratio"] in (0.0, 0.5, 1.0)
        assert not {"zero_std_ratio", "ratio_std", "ratio_spread"} & metrics.keys()
        assert values["ratio_mean"] == metrics["ratio"]
        assert 0 <= values["ratio_std"] <= metrics["ratio_error"] + abs(metrics["ratio"] - 1) + 1e-3


def test_a_run_that_goes_on_is_the_same_one_there_and_tells_no_step_twice(tmp_path, file_service):
    gone = "{kind: accelerate, log_with: file, init: {refuses: 4}}"
    done, folder = run_tiny(tmp_path, "out", gone)
    assert done.code != 0
    assert "tracker 'accelerate': file did not take step 4: gone" in done.stderr
    note = json.loads((folder / "tracking" / "file.json").read_text())
    (folder / "checkpoints" / "step-000004").rename(tmp_path / "lost")  # so that it goes on from step 2
    done, folder = run_tiny(tmp_path, "out", FILE)  # with other options of the tracker
    assert done.code == 0, done.stderr
    assert json.loads((folder / "tracking" / "file.json").read_text())["id"] == note["id"]
    assert [row["step"] for row in told(folder, "log")] == [0, 1, 2, 2, 3, 4, 4]
    assert len(told(folder, "config")) == 1
    assert len(told(folder, "start")) == 2


def test_a_service_that_fails_may_be_dropped(tmp_path, file_service):
    done, folder = run_tiny(tmp_path, "out", FILE.replace("tags: [a]", "on_error: drop, init: {refuses: 3}"))
    assert done.code == 0, done.stderr
    assert "the run goes on without it" in done.stdout + done.stderr
    assert (folder / "finished.json").exists()


def test_a_service_that_is_named_twice_is_refused(tmp_path, file_service):
    done, _ = run_tiny(tmp_path, "out", f"{FILE}, {FILE.replace('[a]', '[b]')}")
    assert "'trackers' names 'accelerate' twice with log_with 'file', which keeps one run at a time" in done.stderr


def test_a_corrected_experiment_is_another_run_there(tmp_path, file_service):
    spec, info = AccelerateTracker(log_with="file", images=False), RunInfo("grpo", 3, tmp_path, 0, 4)
    ids = []
    for begun in ("a", "a", "b"):
        manifest = {"format": 1, "arm": "grpo", "seed": 3, "experiment": {"name": begun}, "versions": {}, "threads": 1}
        (tmp_path / "manifest.json").write_text(json.dumps(manifest))
        observer = spec.build(tmp_path)
        observer.aegpo_on_run_start(info)
        observer.aegpo_on_step_end(info, a_report(1))
        ids.append(json.loads((tmp_path / "tracking" / "file.json").read_text())["id"])
    assert ids[0] == ids[1] != ids[2]
    assert [row["project"] for row in told(tmp_path, "start")] == ["a", "a", "b"]
    assert len(told(tmp_path, "log")) == 2  # the second start tells step 1 no second time


def test_a_picture_of_a_video_is_its_strip():
    assert panels.pictures(torch.zeros(1, 3, 3, 24, 24))[0].size == (74 * 4, 96)
    assert isinstance(panels.pictures(torch.zeros(1, 3, 24, 24))[0], Image.Image)
