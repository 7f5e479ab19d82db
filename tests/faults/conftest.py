"""Tests that break things from outside, under the mark `faults`: `nox -s faults` runs all, `nox -s sample` every tenth.

`--every N` keeps every Nth case of each module, `--fault-seed S` changes what is drawn (flipped bits, mutated files).
"""

from __future__ import annotations

import json
import shutil
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from surroundings import EXPERIMENT, Surroundings, results_in
from warm import Warm

HERE = Path(__file__).parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--every", type=int, default=1, help="of the cases under tests/faults, every Nth of a module")
    parser.addoption("--fault-seed", type=int, default=0, help="what flipped bits and mutated files are drawn with")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks what is here, and keeps every Nth of each module."""
    every, seen, kept = config.getoption("--every"), defaultdict(int), []
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("faults")
            seen[item.path] += 1
            if (seen[item.path] - 1) % every:
                continue
        kept.append(item)
    items[:] = kept


@pytest.fixture(scope="session")
def warm() -> Iterator[Warm]:
    """`warm(words, folder)` runs a command line in a fork of a warm interpreter."""
    server = Warm()
    yield server
    server.close()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> dict[str, Any]:
    """An experiment of 4 steps of a few milliseconds, as a mapping; `write_experiment` makes it a file."""
    from worlds import write_tiny_shapes

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        weights = write_tiny_shapes(tmp_path_factory.mktemp("tiny"))
    return {
        "name": "tiny",
        "training_steps": 4,
        "seeds": [0],
        "device": "cpu",
        "model": {"kind": "shapes", "weights": str(weights)},
        "rewards": ["palette"],
        "prompts": {"train_count": 12, "evaluation_count": 4},
        "rollouts": {"prompts_per_step": 2, "rollouts_per_step": 8, "denoising_steps": 4, "micro_batch": 16},
        "sampler": {"kind": "flow-sde", "noise_level": 0.7},
        "allocator": "uniform",
        "selector": "uniform",
        "tree": "independent",
        "advantage": "group",
        "objective": {"kind": "clipped", "clip": 1e-3},
        "policy": {"ema": 0.9},
        "evaluation": {"every": 2, "images": 4, "rewards": ["scene"]},
        "checkpoint": {"every": 1},
        "trackers": ["console", "jsonl"],
    }


@pytest.fixture
def write_experiment(tiny, tmp_path):
    """`write_experiment(rewards=[...])` writes the tiny experiment with other sections, as JSON, which is YAML."""

    def write(name: str = "tiny.yaml", **changes: Any) -> Path:
        path = tmp_path / name
        path.write_text(json.dumps(tiny | changes, indent=1))
        return path

    return write


@pytest.fixture(scope="session")
def surroundings(warm) -> Iterator[Surroundings]:
    """A folder of its own that other users may enter, with an experiment of 3 steps and what becomes of it."""
    from worlds import write_tiny_shapes

    folder = Path(tempfile.mkdtemp(prefix="aegpo-faults-"))
    folder.chmod(0o755)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        weights = write_tiny_shapes(folder / "weights")
    for path in (weights, *weights.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    (folder / "spec.yaml").write_text(EXPERIMENT.format(weights=weights))
    made = Surroundings(folder, folder / "reference")
    ended = warm(["run", "spec.yaml", "--out", made.finished], folder)
    assert ended.code == 0, ended.out
    made.results = results_in(made.finished)
    yield made
    shutil.rmtree(folder, ignore_errors=True)
