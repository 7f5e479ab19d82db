"""What goes wrong with models and rewards, as the command line tells it: a message and exit code 2."""

from __future__ import annotations

import json
import shutil

import pytest
from command_line import Done, aegpo
from safetensors.torch import load_file, save_file

FILE = """\
name: bad
training_steps: 1
device: cpu
model: {kind: sd3, path: nobody/nothing, height: 16, width: 16}
prompts: {train: train.txt, evaluation: held-out.txt}
rollouts: {prompts_per_step: 1, rollouts_per_step: 2, denoising_steps: 2}
rewards: [palette]
allocator: uniform
selector: uniform
tree: independent
objective: clipped
sampler: flow-sde
advantage: group
"""
PLUGIN = '''
"""A reward whose scores have a dimension too many."""
from typing import Literal

from aegpo.core.hookspecs import hookimpl
from aegpo.core.experiment import RewardSpec


class Flat(RewardSpec):
    """A column instead of a row."""

    kind: Literal["flat"] = "flat"

    def score(self, images, prompts):
        return images.mean(dim=(1, 2, 3))[:, None]


@hookimpl
def aegpo_register_rewards(registry):
    registry.add(Flat)
'''


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "train.txt").write_text("a red circle\na blue square\n")
    (tmp_path / "held-out.txt").write_text("a green triangle\n")
    (tmp_path / "odd.py").write_text(PLUGIN)
    (tmp_path / "bad.yaml").write_text(FILE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*words: str) -> Done:
    return aegpo("run", "bad.yaml", "--no-report", *words)


def refused(done: Done, message: str) -> None:
    assert done.code == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_corrected_path_needs_no_fresh_start(folder, pipeline_folders):
    refused(run(), "error: model 'sd3': hub id 'nobody/nothing' is not in the cache, and HF_HUB_OFFLINE is set")
    assert (folder / "runs/bad/main/seed-0/manifest.json").exists()
    done = run("--set", f"model.path={pipeline_folders['sd3']}")
    assert "was begun with another experiment" not in done.stderr
    manifest = json.loads((folder / "runs/bad/main/seed-0/manifest.json").read_text())
    assert manifest["experiment"]["model"]["path"] == str(pipeline_folders["sd3"])


def test_another_pipeline_is_refused(folder, pipeline_folders):
    done = run("--set", f"model.path={pipeline_folders['flux']}")
    refused(done, "FluxPipeline")


@pytest.mark.parametrize("how", ["keys", "nan"])
def test_broken_weights_are_refused(folder, pipeline_folders, how):
    broken = folder / "broken"
    shutil.copytree(pipeline_folders["sd3"], broken)
    path = broken / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    name = next(name for name in weights if name.startswith("decoder.conv_out") and name.endswith("weight"))
    if how == "keys":
        del weights[name]
    else:
        weights[name] = weights[name] * float("nan")
    save_file(weights, path, metadata={"format": "pt"})
    told = "lacks weights the config asks for" if how == "keys" else "model 'sd3' decoded "
    refused(run("--set", f"model.path={broken}"), told)


def test_scores_of_another_shape_are_refused(folder, pipeline_folders):
    done = run("--set", f"model.path={pipeline_folders['sd3']}", "--plugin", "odd.py", "--set", "rewards=[flat]")
    refused(done, "error: reward 'flat' returned scores of shape (1, 1), float32; (1,), float32 was asked")
