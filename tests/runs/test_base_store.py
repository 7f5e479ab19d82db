"""What runs of an experiment share of the untrained policy: no record of a run depends on whether it is there."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import chdir
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import Done, aegpo
from safetensors import safe_open
from safetensors.numpy import save_file

from aegpo.core.digests import checksum
from aegpo.parallel.team import Team
from aegpo.runs import base_store
from aegpo.runs.base_store import FOLDER, BaseStore

EXPERIMENT = """
name: tiny
training_steps: 3
seeds: [0, 1]
device: cpu
model: {{kind: shapes, weights: {weights}}}
rewards: [palette]
prompts: {{train_count: 8, evaluation_count: 3}}
rollouts: {{prompts_per_step: 2, rollouts_per_step: 8, denoising_steps: 3}}
policy: {{ema: 0.9}}
evaluation: {{every: 2, images: 2, images_per_prompt: 2, rewards: [scene, diversity]}}
checkpoint: {{every: 1, keep: 5}}
trackers: [jsonl]
arms:
  grpo: {{}}
  allocation: {{allocator: {{kind: entropy, low: 2, high: 6}}}}
  aegpo: {{allocator: {{kind: entropy, low: 2, high: 6}}, selector: {{kind: entropy-peak, top_k: 2}}, tree: branching}}
  lora: {{policy: {{train: lora, rank: 2}}, allocator: {{kind: entropy, low: 2, high: 6}}}}
"""
RUNS = [("grpo", 0), ("allocation", 0), ("aegpo", 0), ("lora", 0), ("aegpo", 1), ("lora", 1)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_weights):
    folder = tmp_path_factory.mktemp("shared")
    (folder / "tiny.yaml").write_text(EXPERIMENT.format(weights=tiny_weights))
    return folder


def run(folder: Path, out: str, arm: str, seed: int = 0, *words: str) -> Done:
    with chdir(folder):
        done = aegpo("run", "tiny.yaml", "--arm", arm, "--seed", str(seed), "--out", out, "--no-report", *words)
    assert done.code == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def shared(folder):
    """The experiment's folder after all runs."""
    for arm, seed in RUNS:
        run(folder, "shared", arm, seed)
    return folder / "shared" / "tiny"


@pytest.fixture(scope="module")
def apart(folder):
    """The same, where no run finds what another one measured."""
    for arm, seed in RUNS:
        run(folder, "apart", arm, seed)
        shutil.rmtree(folder / "apart" / "tiny" / FOLDER)
    return folder / "apart" / "tiny"


def content(path: Path) -> object:
    """What a file says; safetensors write the same metadata in any order."""
    if path.suffix != ".safetensors":
        return path.read_bytes()
    with safe_open(path, framework="numpy") as file:
        return file.metadata(), {name: file.get_tensor(name).tobytes() for name in file.keys()}  # noqa: SIM118


def records(run: Path) -> dict[str, object]:
    """All that a run has on disk but wall-clock; checksums sign files in which metadata have any order."""
    odd = {"timing.jsonl", ".lock", "checksums.json"}
    return {
        str(path.relative_to(run)): content(path) for path in run.rglob("*") if path.is_file() and path.name not in odd
    }


def kept(experiment: Path, what: str) -> set[Path]:
    return set((experiment / FOLDER / what).glob("*"))


def test_every_run_has_the_bytes_that_it_has_without_a_store(shared, apart):
    for arm, seed in RUNS:
        one, other = (records(each / arm / f"seed-{seed}") for each in (shared, apart))
        assert one.keys() == other.keys()
        assert [name for name in one if one[name] != other[name]] == [], (arm, seed)
        assert any("signals/entropy" in name for name in one) == (arm != "grpo")


def test_each_thing_is_measured_once(shared):
    """Scores for all runs that train the same layers, entropies for arms that ask the same prompts together."""
    assert all(path.suffix == ".safetensors" for what in ("evaluation", "entropy") for path in kept(shared, what))
    whose = [next(iter(sorted(names(path)))) for path in kept(shared, "evaluation")]
    assert sorted(whose) == ["images/float32"] * 2 + ["scores"] * 2, "LoRA wraps layers, which renames the base's"
    asked = {(seed, step) for seed in (0, 1) for step in (1, 2, 3)}
    assert len(kept(shared, "entropy")) == 2 * len(asked), "with LoRA and without"


def names(path: Path) -> list[str]:
    with safe_open(path, framework="numpy") as file:
        return list(file.keys())


def write_over(path: Path, name: str, change) -> None:
    """Changes an array as nobody but the store does: with a checksum that fits."""
    with safe_open(path, framework="numpy") as file:
        told, arrays = file.metadata(), {each: file.get_tensor(each) for each in file.keys()}  # noqa: SIM118
    arrays[name] = change(arrays[name])
    save_file(arrays, path, metadata={**told, "sha256": checksum(arrays)})


def test_what_is_there_is_read_and_counted_as_measured_also_when_a_run_starts_over(folder, shared):
    shutil.copytree(shared, folder / "read" / "tiny")
    for path in kept(folder / "read" / "tiny", "evaluation"):
        write_over(path, "scores", lambda scores: scores / 2)
    for path in kept(folder / "read" / "tiny", "entropy"):
        write_over(path, "entropy", lambda entropy: entropy + 1)
    run(folder, "read", "aegpo", 0, "--fresh")
    before, after = (rows(each / "aegpo" / "seed-0", "evaluations") for each in (shared, folder / "read" / "tiny"))
    for label in ("palette", "scene", "diversity"):
        assert after[0]["scores"][label] == [value / 2 for value in before[0]["scores"][label]]
        assert [row["base_scores"][label] for row in after] == [
            [value / 2 for value in row["base_scores"][label]] for row in before
        ]
    before, after = (rows(each / "aegpo" / "seed-0", "metrics") for each in (shared, folder / "read" / "tiny"))
    assert before[0]["signals"]["entropy-delta"] == [0, 0], "it has not moved, to the bit"
    assert after[0]["signals"]["entropy-delta"] == pytest.approx([1, 1])
    assert [row["metrics"]["signal_forwards"] for row in after] == [row["metrics"]["signal_forwards"] for row in before]


def rows(run: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (run / f"{name}.jsonl").read_text().splitlines()]


def a_flipped_bit(path: Path) -> None:
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)


def another_file(path: Path) -> None:
    other = next(each for each in path.parent.parent.rglob("*.safetensors") if each != path)
    shutil.copyfile(other, path)


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES = [
    a_flipped_bit,
    another_file,
    a_folder,
    lambda path: path.write_bytes(b""),
    lambda path: path.write_bytes(b"x" * 99),
]


@pytest.mark.parametrize("damage", DAMAGES, ids=["bit", "other", "folder", "empty", "nonsense"])
def test_a_damaged_file_is_said_once_and_measured_again(folder, shared, damage, request):
    out = request.node.callspec.id
    shutil.copytree(shared, folder / out / "tiny")
    for path in sorted((folder / out / "tiny" / FOLDER).rglob("*.safetensors")):
        damage(path)
    done = run(folder, out, "aegpo", 0, "--fresh")
    assert done.stdout.count("warning: ") == 1
    assert records(folder / out / "tiny" / "aegpo" / "seed-0") == records(shared / "aegpo" / "seed-0")
    if damage is not a_folder:
        assert "measured again" in done.stdout
        assert "warning" not in run(folder, out, "aegpo", 0, "--fresh").stdout


def test_a_file_in_the_place_of_the_store_changes_nothing(folder, shared):
    (folder / "blocked" / "tiny").mkdir(parents=True)
    (folder / "blocked" / "tiny" / FOLDER).write_text("")
    done = run(folder, "blocked", "aegpo")
    assert done.stdout.count("warning: ") == 1
    assert records(folder / "blocked" / "tiny" / "aegpo" / "seed-0") == records(shared / "aegpo" / "seed-0")


def test_a_run_that_goes_on_has_the_same_bytes_with_the_store_and_without(folder, shared):
    for store in (True, False):
        out = f"goes-on-{store}"
        shutil.copytree(shared, folder / out / "tiny")
        again = folder / out / "tiny" / "aegpo" / "seed-0"
        (again / "finished.json").unlink()
        for step in (2, 3):
            shutil.rmtree(again / "checkpoints" / f"step-{step:06d}")
        if not store:
            shutil.rmtree(folder / out / "tiny" / FOLDER)
        run(folder, out, "aegpo")
        assert records(again) == records(shared / "aegpo" / "seed-0")


@pytest.mark.parametrize(
    ("change", "entropies", "evaluations"),
    [
        ("evaluation.seed=1", 0, 2),
        ("evaluation.denoising_steps=2", 0, 2),
        ("rewards=[scene]", 0, 2),
        ("rollouts.micro_batch=4", 3, 2),
        ("rollouts.denoising_steps=4", 3, 2),
        ("precision=bfloat16", 3, 2),
        ("parallel.shards=2", 3, 2),
        ("signals.entropy.seed=3", 3, 0),
        ("optimizer.learning_rate=1e-5", 0, 0),
        ("evaluation.every=1", 0, 0),
    ],
)
def test_what_numbers_depend_on_is_part_of_the_key(folder, shared, change, entropies, evaluations, request):
    out = f"change-{request.node.callspec.indices['change']}"
    shutil.copytree(shared / FOLDER, folder / out / "tiny" / FOLDER)
    words = ["--set", "evaluation.rewards=[diversity]"] if change.startswith("rewards") else []
    run(folder, out, "aegpo", 0, "--set", change, *words)
    before, after = (
        {what: len(kept(each, what)) for what in ("entropy", "evaluation")} for each in (shared, folder / out / "tiny")
    )
    assert after["entropy"] - before["entropy"] == entropies
    assert after["evaluation"] - before["evaluation"] == evaluations


PLUGIN = """
from typing import Literal
import aegpo

class Silent(aegpo.RewardSpec):
    '''Brightness, without a word on what it depends on.'''
    kind: Literal["silent"] = "silent"
    def score(self, images, prompts):
        return images.mean(dim=(1, 2, 3))

class Remembering(Silent):
    '''Brightness; it says that it depends on nothing, but it has a memory.'''
    kind: Literal["remembering"] = "remembering"
    def identity(self):
        return {}
    def state_dict(self):
        return {}
    def load_state_dict(self, state):
        pass

class Odd(Silent):
    '''Brightness, with an identity that is no JSON.'''
    kind: Literal["odd"] = "odd"
    def identity(self):
        return {"what": object()}

@aegpo.hookimpl
def aegpo_register_rewards(registry):
    for each in (Silent, Remembering, Odd):
        registry.add(each)
"""


@pytest.mark.parametrize("reward", ["silent", "remembering"])
def test_scores_that_may_depend_on_more_are_not_shared(folder, reward):
    (folder / "silent.py").write_text(PLUGIN)
    run(folder, reward, "allocation", 0, "--set", f"rewards=[{reward}]", "--plugin", "silent.py")
    assert not kept(folder / reward / "tiny", "evaluation")


def test_an_identity_that_is_no_json_is_its_rewards_fault(folder):
    (folder / "silent.py").write_text(PLUGIN)
    with chdir(folder):
        words = ("--arm", "grpo", "--seed", "0", "--out", "odd", "--set", "rewards=[odd]", "--plugin", "silent.py")
        done = aegpo("run", "tiny.yaml", *words)
    assert done.code == 2
    assert "reward 'odd'" in done.stderr


def test_a_run_that_was_moved_away_shares_nothing(folder, shared):
    moved = folder / "elsewhere" / "moved"
    shutil.copytree(shared / "aegpo" / "seed-0", moved)
    (moved / "finished.json").unlink()
    shutil.rmtree(moved / "checkpoints" / "step-000003")
    with chdir(folder):
        done = aegpo("run", str(moved))
    assert done.code == 0, done.stderr
    assert not list(folder.glob(f"**/elsewhere/**/{FOLDER}"))


# --- the store itself -------------------------------------------------------------------------------------------------


def store_in(folder: Path, said: list[str] | None = None, patience: float = 60) -> BaseStore:
    return BaseStore(folder, {"common": 1}, Team.alone(), (said if said is not None else []).append, patience)


def asked(store: BaseStore, measured: list[int], value: float = 1.0) -> float:
    def measure():
        measured.append(1)
        return {"value": np.array([value, np.nan])}

    return float(store.known("entropy", lambda: {"of": "this"}, measure)["value"][0])


def test_what_was_measured_is_read_by_others_to_the_bit(tmp_path):
    measured: list[int] = []
    assert asked(store_in(tmp_path), measured, 0.1) == 0.1
    assert asked(store_in(tmp_path), measured, 0.2) == 0.1
    assert len(measured) == 1
    assert [path.suffix for path in (tmp_path / "entropy").iterdir()] == [".safetensors"]


@pytest.mark.parametrize("draw", [random.random, np.random.random, lambda: torch.rand(1)])
def test_what_was_drawn_by_chance_is_not_kept(tmp_path, draw):
    def measure():
        draw()
        return {"value": np.zeros(1)}

    store_in(tmp_path).known("entropy", dict, measure)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_what_is_too_large_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(base_store, "LARGEST", 15)
    assert asked(store_in(tmp_path), []) == 1
    assert not list(tmp_path.rglob("*.safetensors"))


def test_of_two_that_want_the_same_one_measures_and_the_other_waits_and_reads(tmp_path):
    begun, go_on, found = threading.Event(), threading.Event(), list[float]()
    measured: list[int] = []

    def slow():
        begun.set()
        assert go_on.wait(60)
        return {"value": np.array([5.0])}

    first = threading.Thread(target=lambda: store_in(tmp_path).known("entropy", lambda: {"of": "this"}, slow))
    second = threading.Thread(target=lambda: found.append(asked(store_in(tmp_path), measured)))
    first.start()
    assert begun.wait(60)
    second.start()
    second.join(0.5)
    assert second.is_alive(), "it waits"
    go_on.set()
    first.join(60)
    second.join(60)
    assert (found, measured) == ([5.0], [])


def test_one_that_fails_lets_the_next_on(tmp_path):
    def fail():
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        store_in(tmp_path).known("entropy", lambda: {"of": "this"}, fail)
    assert asked(store_in(tmp_path), []) == 1


HOLDER = """
import sys, time
from pathlib import Path
from aegpo.parallel.team import Team
from aegpo.runs.base_store import BaseStore
def measure():
    print("measures", flush=True)
    time.sleep(600)
BaseStore(Path(sys.argv[1]), {"common": 1}, Team.alone(), print).known("entropy", lambda: {"of": "this"}, measure)
"""


def test_one_that_is_killed_or_takes_too_long_holds_up_nobody(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "measures\n"
        holder.send_signal(signal.SIGSTOP)
        measured: list[int] = []
        assert asked(store_in(tmp_path, patience=0.2), measured) == 1
        assert len(measured) == 1, "it has waited long enough"
        shutil.rmtree(tmp_path / "entropy")
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    assert asked(store_in(tmp_path), measured) == 1
    assert len(measured) == 2


def test_the_lock_of_one_that_was_killed_is_free(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "measures\n"
    holder.kill()
    holder.wait()
    holder.stdout.close()
    assert list(tmp_path.rglob("*.lock"))
    assert asked(store_in(tmp_path), []) == 1
    assert not list(tmp_path.rglob("*.lock"))


@pytest.mark.slow
def test_several_processes_read_what_one_measured_and_one_what_they_did(folder):
    """Of a run of two shards: the same bytes from one process, from two that measure and from two that read."""
    words = ["--set", "parallel.shards=2"]
    run(folder, "one", "aegpo", 0, *words)
    records_of_one = records(folder / "one" / "tiny" / "aegpo" / "seed-0")
    for out in ("one", "two"):
        command = f"run tiny.yaml --arm aegpo --seed 0 --out {out} --no-report --fresh --processes 2"
        done = subprocess.run(
            [sys.executable, "-m", "aegpo", *command.split(), *words], cwd=folder, capture_output=True
        )
        assert done.returncode == 0, done.stderr.decode()
        there = records(folder / out / "tiny" / "aegpo" / "seed-0")
        assert [name for name in there if name != "manifest.json" and there[name] != records_of_one.get(name)] == []
        assert len(kept(folder / out / "tiny", "entropy")) == 3, "what one measured is what two would"
        assert len(kept(folder / out / "tiny", "evaluation")) == 2
