"""Sharded weights learn what whole weights learn, but for rounding: L2 of the difference beside that of what moved."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml
from pipelines import write_flux, write_sd3
from ports import free_port
from safetensors.torch import load_file

from aegpo.parallel.sharding import units_of

# Of a fixture and a test, each of which starts processes.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
HERE = Path(__file__).parent
FILE = HERE / "shards.yaml"
SHARDED = {"shards": 4, "weights": "sharded"}
ARMS = ("aegpo-on-policy", "forward", "lora")
STEPS = 4


def launch(processes: int, file: Path, parallel: object, folder: Path, arms: Sequence[str]):
    """The processes of one team."""
    port = free_port()
    folder.mkdir(parents=True, exist_ok=True)
    started = []
    for rank in range(processes):
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        told = {name: str(value) for name, value in {**ranks, "MASTER_PORT": port, "OMP_NUM_THREADS": 1}.items()}
        words = [str(file), json.dumps(parallel), str(folder), *arms]
        environment = {**os.environ, **told, "MASTER_ADDR": "127.0.0.1"}
        command = [sys.executable, str(HERE / "sharded_worker.py"), *words]
        started.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    return started


def outcomes(processes: int, file: Path, parallel: object, folder: Path, arms: Sequence[str]):
    """What each arm begins and ends with."""
    started = launch(processes, file, parallel, folder, arms)
    errors = [process.communicate(timeout=800)[1] for process in started]
    assert not any(process.returncode for process in started), "\n".join(error[-2000:] for error in errors)
    return {arm: load_file(folder / f"{arm}.safetensors") for arm in arms}


def longer(folder: Path, file: Path = FILE, **changes: object) -> Path:
    """An experiment of more steps."""
    data = yaml.safe_load(file.read_text())
    made = folder / "longer.yaml"
    made.write_text(yaml.safe_dump({**data, **changes, "training_steps": STEPS}))
    return made


def apart(found, expected, kind: str = "policy") -> float:
    """L2 of the difference of weights, beside how far they moved."""
    names = [name for name in expected if name.startswith(f"{kind}/")]
    between = sum((found[name] - expected[name]).double().square().sum() for name in names)
    moved = sum((expected[name] - expected[f"_begin/{name}"]).double().square().sum() for name in names)
    assert moved > 0
    return float((between / moved).sqrt())


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    return outcomes(1, longer(folder), {"shards": 4}, folder, ARMS)


@pytest.mark.parametrize(
    ("processes", "parallel", "arms"),
    [
        (2, SHARDED, ARMS),
        (2, {**SHARDED, "gather": "never"}, ("aegpo-on-policy",)),
        (3, {**SHARDED, "gather": "never"}, ("forward",)),
        (4, {**SHARDED, "replicas": 2}, ("lora",)),
    ],
    ids=["gathered", "in_lockstep", "three_in_lockstep", "in_two_replicas"],
)
def test_sharded_weights_learn_what_whole_ones_learn(alone, tmp_path, processes, parallel, arms):
    found = outcomes(processes, longer(tmp_path), parallel, tmp_path / "sharded", arms)
    for arm in arms:
        for name, tensor in alone[arm].items():
            assert found[arm][name].shape == tensor.shape, (arm, name)
        assert all(apart(found[arm], alone[arm], kind) <= 1e-4 for kind in ("policy", "ema")), arm
        assert (found[arm]["_scores/begin"] - alone[arm]["_scores/begin"]).abs().max() <= 1e-5, arm
        assert (found[arm]["_scores/end"] - found[arm]["_scores/whole"]).abs().max() <= 1e-5, arm


PIPELINE = {
    "name": "pipelines",
    "seeds": [0],
    "device": "cpu",
    "rewards": ["palette"],
    "rollouts": {"prompts_per_step": 3, "rollouts_per_step": 6, "denoising_steps": 3, "micro_batch": 2},
    "allocator": "uniform",
    "selector": "uniform",
    "tree": "independent",
    "sampler": "flow-sde",
    "advantage": "group",
    "objective": {"kind": "clipped", "beta": 0.01},
    "policy": {"ema": 0.9},
    "optimizer": {"learning_rate": 1e-3, "micro_batch": 2},
}


@pytest.mark.parametrize(("kind", "chosen"), [("sd3", ("full", "half-lora")), ("flux", ("lora", "half"))])
def test_pipelines_learn_so_with_checkpointed_gradients_and_adapters_and_in_bfloat16(tmp_path, kind, chosen):
    path = {"sd3": write_sd3, "flux": write_flux}[kind](tmp_path / kind)
    model = {"kind": kind, "path": str(path), "height": 24, "width": 24, "dtype": "float32"}
    half = {**model, "dtype": "bfloat16"}
    arms = {
        "full": {"model": {**model, "gradient_checkpointing": True}},
        "lora": {"model": model, "policy": {"train": "lora", "rank": 2, "alpha": 4}},
        "half": {"model": half},
        "half-lora": {"model": half, "policy": {"train": "lora", "rank": 2, "alpha": 4}},
    }
    file, prompts = tmp_path / "pipelines.yaml", {"train": "train.txt", "evaluation": "held-out.txt"}
    (tmp_path / "train.txt").write_text("a red circle\na blue square\ntwo green circles\n")
    (tmp_path / "held-out.txt").write_text("a green circle\n")
    file.write_text(
        yaml.safe_dump(
            {**PIPELINE, "training_steps": STEPS, "prompts": prompts, "arms": {arm: arms[arm] for arm in chosen}}
        )
    )
    whole = outcomes(1, file, {"shards": 2}, tmp_path / "alone", chosen)
    found = outcomes(2, file, {"shards": 2, "weights": "sharded"}, tmp_path / "sharded", chosen)
    for arm in chosen:  # products of bfloat16 are of 8 bits
        assert apart(found[arm], whole[arm]) <= (0.2 if "half" in arm else 1e-4), arm


def test_what_is_gathered_at_once_are_blocks_and_large_parts():
    from aegpo.models.shapes import ShapesSpec

    network = ShapesSpec().build("cpu").policy
    units = units_of(network)
    assert len(units) >= len(network.transformer_blocks)
    assert all(block in units for block in network.transformer_blocks)
