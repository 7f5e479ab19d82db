"""`--plugin a/reward.py --plugin b/reward.py`: both work, and every process finds the same classes."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys

import pytest

from aegpo.commands.launch_request import LaunchRequest
from aegpo.commands.run import launch
from aegpo.plugin.manager import load_registries, plugin_manager

# `Scale` is written below the class that needs it, so pydantic looks for it in the module when it is first used.
REWARD = '''
from __future__ import annotations
from typing import Literal
import aegpo

class Constant(aegpo.RewardSpec):
    """The same score for everything."""
    kind: Literal["{kind}"] = "{kind}"
    scale: Scale | None = None

    def score(self, images, prompts):
        return images.new_full((len(images),), {score}) + images.mean(dim=(1, 2, 3))

class Scale(aegpo.Spec):
    """Of scores."""
    {field}: int = 1

@aegpo.hookimpl
def aegpo_register_rewards(registry):
    registry.add(Constant)
'''
TINY = """
name: tiny
training_steps: 2
model: {{kind: shapes, weights: {weights}}}
prompts: {{train_count: 2, evaluation_count: 2}}
rollouts: {{prompts_per_step: 2, rollouts_per_step: 4, denoising_steps: 3}}
rewards: [{{kind: of-a, scale: {{a: 2}}}}, {{kind: of-b, scale: {{b: 3}}}}]
allocator: uniform
selector: uniform
tree: independent
sampler: flow-sde
advantage: group
objective: clipped
checkpoint: {{every: 1}}
evaluation: {{every: 2, images: 2}}
"""
FILES = ("a/reward.py", "b/reward.py")
NAMES = """
from aegpo.plugin.manager import load_registries, plugin_manager
rewards = load_registries(plugin_manager({files})).rewards
print([(rewards.get(kind).__module__, rewards.get(kind).__qualname__) for kind in ("of-a", "of-b")])
"""


@pytest.fixture
def site(tmp_path, monkeypatch, tiny_weights):
    """A folder with both files, where no plugin is installed, and an experiment that needs both."""
    monkeypatch.delenv("AEGPO_BLOCK_PLUGINS", raising=False)
    if installed := {entry.dist.name for entry in importlib.metadata.entry_points(group="aegpo")}:
        monkeypatch.setenv("AEGPO_BLOCK_PLUGINS", ",".join(installed))
    for folder, score in (("a", 1), ("b", 2)):
        (tmp_path / folder).mkdir()
        text = REWARD.format(kind=f"of-{folder}", score=score, field=folder)
        (tmp_path / folder / "reward.py").write_text(text)
    (tmp_path / "tiny.yaml").write_text(TINY.format(weights=tiny_weights))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names(rewards):
    return [(rewards.get(kind).__module__, rewards.get(kind).__qualname__) for kind in ("of-a", "of-b")]


def test_files_of_one_stem_are_modules_of_their_own_with_their_own_classes(site):
    rewards = load_registries(plugin_manager(FILES)).rewards
    for kind, field in (("of-a", "a"), ("of-b", "b")):
        spec = rewards.get(kind)
        assert vars(sys.modules[spec.__module__])["Constant"] is spec
        assert spec.model_validate({"scale": {field: 5}}).scale.model_dump() == {field: 5}


def test_another_process_finds_the_same_classes(site):
    done = subprocess.run(
        [sys.executable, "-c", NAMES.format(files=list(FILES))], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(names(load_registries(plugin_manager(FILES)).rewards))
    spelt_otherwise = ("./a/reward.py", str(site / "b" / "reward.py"))
    assert names(load_registries(plugin_manager(spelt_otherwise)).rewards) == names(
        load_registries(plugin_manager(FILES)).rewards
    )


@pytest.mark.slow
def test_both_work_in_one_run_and_in_the_process_that_goes_on_with_it(site):
    request = LaunchRequest(site / "tiny.yaml", plugins=FILES, out=site / "out", report=False)
    assert launch(request) == 0
    run = site / "out" / "tiny" / "main" / "seed-0"
    rows = (run / "metrics.jsonl").read_text()
    assert "reward/of-a" in rows
    assert "reward/of-b" in rows
    (run / "finished.json").unlink()
    shutil.rmtree(run / "checkpoints" / "step-000002")
    command = [sys.executable, "-m", "aegpo", *request.command()]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (run / "metrics.jsonl").read_text() == rows
