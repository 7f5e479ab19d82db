"""`aegpo.load`, `aegpo.run` and `aegpo.evaluate`: what the command line does, for scripts and notebooks."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Literal

import pytest
import yaml
from command_line import aegpo as command
from worlds import write_tiny_shapes

import aegpo
from aegpo.models.shapes import ShapesSpec
from aegpo.rewards.palette import PaletteReward

FIELDS = {
    "name": "tiny",
    "training_steps": 2,
    "device": "cpu",
    "prompts": {"train_count": 2, "evaluation_count": 3},
    "rollouts": {"prompts_per_step": 2, "rollouts_per_step": 8, "denoising_steps": 3},
    "rewards": ["palette"],
    "checkpoint": {"every": 1},
    "evaluation": {"every": 2, "images": 2},
    "seeds": [0, 1],
}
RECORDS = ("metrics.jsonl", "evaluations.jsonl")


class Redness(aegpo.RewardSpec):
    """How red images are."""

    kind: Literal["redness"] = "redness"
    floor: float = 0.0

    def score(self, images, prompts):
        return images[:, 0].mean(dim=(1, 2)).clamp(min=self.floor)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return write_tiny_shapes(tmp_path_factory.mktemp("weights"))


@pytest.fixture
def fields(weights, tmp_path, monkeypatch) -> dict:
    monkeypatch.chdir(tmp_path)
    return {**FIELDS, "model": {"kind": "shapes", "weights": weights}}


def recorded(folder: str, seed: int) -> list[bytes]:
    return [(Path(folder) / "tiny" / "main" / f"seed-{seed}" / name).read_bytes() for name in RECORDS]


def test_python_and_the_command_line_record_the_same_and_go_on_with_each_other(fields, capsys):
    Path("tiny.yaml").write_text(
        yaml.safe_dump({**fields, "model": {**fields["model"], "weights": str(fields["model"]["weights"])}})
    )
    assert command("run", "tiny.yaml", "--seed", "0", "--out", "by-command", "--no-report").code == 0
    study = aegpo.run(fields, seeds=[0], out="by-python", report=False)
    assert "step 1/2" in capsys.readouterr().out  # progress, though no tracker is named
    assert recorded("by-python", 0) == recorded("by-command", 0)
    assert list(study.runs) == [("main", 0)]
    assert study.runs["main", 0].evaluations[-1].scores["palette"].shape == (3,)
    done = aegpo.run("tiny.yaml", out="by-command", progress=False)
    assert set(done.runs) == {("main", 0), ("main", 1)}
    assert capsys.readouterr().out.count("report: ") == 1
    assert "finished before" in command("run", "tiny.yaml", "--seed", "1", "--out", "by-command", "--no-report").stdout


def test_specs_stand_where_a_file_has_names(fields):
    model = ShapesSpec(weights=fields["model"]["weights"])
    file = aegpo.load({**fields, "model": model, "rewards": [PaletteReward(weight=2.0), Redness()], "seeds": [3]})
    (experiment,) = file.arms.values()
    assert [type(each) for each in experiment.rewards] == [PaletteReward, Redness]
    assert experiment.rewards[0].weight == 2.0
    assert experiment.model == model
    assert experiment.seed == 3
    again = aegpo.load(experiment)
    assert again.arms["main"] == experiment
    assert again.seeds == (3,)
    changed = aegpo.load(experiment, overrides={"rewards": [Redness(floor=0.5)], "rollouts.denoising_steps": 4})
    assert changed.arms["main"].rewards == (Redness(floor=0.5),)
    assert changed.arms["main"].rollouts.denoising_steps == 4


def test_a_reward_of_a_notebook_is_trained_and_evaluated(fields):
    study = aegpo.run({**fields, "rewards": [Redness()], "seeds": [0]}, report=False, progress=False)
    folder = study.runs["main", 0].folder
    assert study.labels == ("redness",)
    found = aegpo.evaluate(folder, rewards=[Redness(floor=0.9), "palette"], out="scores", parts=[Redness])
    assert [line.reward for line in found.lines] == ["redness", "palette"]
    assert Path("scores/index.html").is_file()
    own = aegpo.evaluate(folder, parts=[Redness], out="own")
    assert [line.reward for line in own.lines] == ["redness"]


def test_a_cell_may_be_run_again(fields):
    def cell() -> type[aegpo.RewardSpec]:
        class Greenness(aegpo.RewardSpec):
            """How green images are."""

            kind: Literal["greenness"] = "greenness"

            def score(self, images, prompts):
                return images[:, 1].mean(dim=(1, 2))

        return Greenness

    one = aegpo.run({**fields, "rewards": [cell()()]}, seeds=[0], report=False, progress=False)
    two = aegpo.run({**fields, "rewards": [cell()()]}, seeds=[0, 1], report=False, progress=False)
    assert one.runs["main", 0].evaluations[-1].step == 2
    assert set(two.runs) == {("main", 0), ("main", 1)}


def test_a_run_outside_the_main_thread_goes_through(fields):
    found = []
    worker = threading.Thread(target=lambda: found.append(aegpo.run(fields, seeds=[0], report=False, progress=False)))
    worker.start()
    worker.join()
    assert found[0].runs["main", 0].finished


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"training_stps": 2}, "experiment:.*: training_stps: unknown key; .*'training_steps'"),
        ({"rewards": [Redness]}, "experiment: a ModelMetaclass cannot stand in an experiment"),
        ({"rollouts": {1: 2}}, "experiment: 1 is no text"),
        ({"rewards": ["redness"]}, "redness"),
    ],
)
def test_mistakes_are_told_as_those_of_a_file(fields, change, words):
    with pytest.raises(aegpo.SpecError, match=words):
        aegpo.load({**fields, **change})


def test_what_cannot_be_done_says_so(fields):
    file = aegpo.load(fields)
    with pytest.raises(aegpo.SpecError, match=r"give them to aegpo\.load"):
        aegpo.run(file, overrides={"training_steps": 3})
    with pytest.raises(aegpo.PluginError, match="is no class of a part; it extends none of ModelSpec, RewardSpec"):
        aegpo.load(fields, parts=[Path])
    with pytest.raises(aegpo.AegpoError, match="has no arm 'man'"):
        aegpo.run(file, arms=["man"])


@pytest.mark.slow
def test_an_interrupted_call_goes_on(tmp_path, weights):
    script = f"""
import os, signal, sys
from typing import Literal
import aegpo

class Slowly(aegpo.RewardSpec):
    "The mean; the first step is interrupted."
    kind: Literal["slowly"] = "slowly"
    def score(self, images, prompts):
        if len(sys.argv) > 1 and len(images) == 8:
            os.kill(os.getpid(), signal.SIGINT)
        return images.mean(dim=(1, 2, 3))

model = {{"kind": "shapes", "weights": {str(weights)!r}}}
fields = {FIELDS!r} | {{"model": model, "rewards": [Slowly()], "seeds": [0]}}
try:
    study = aegpo.run(fields, report=False)
except KeyboardInterrupt as stop:
    print(stop)
else:
    print(len(study.runs["main", 0].steps), "steps")
"""
    (tmp_path / "cells.py").write_text(script)

    def start(*words: str) -> str:
        asked = [sys.executable, "cells.py", *words]
        return subprocess.run(asked, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=120).stdout

    assert "main seed 0 is saved; the same call goes on with it" in start("stop")
    assert "2 steps" in start()
