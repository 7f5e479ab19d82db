"""Experiment files that are mutated: `check` refuses them with their place, and what it accepts runs or says why not.

600 files go through `check`, and 150 that it accepts through a run of one step; `--fault-seed` draws others.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from mutations import Mutation, mutated
from warm import Ended

from aegpo.config.loading import load_experiment_file
from aegpo.core.experiment import Experiment
from aegpo.errors import AegpoError
from aegpo.method.costs import costs
from aegpo.plugin.manager import load_registries, plugin_manager

CHECKED, RUN = 600, 150
SECONDS = 20  # of the processor
MOST_MEMORY = 2 * 2**30  # bytes
MOST_WORK, MOST_IMAGES = 3_000, 64  # velocity evaluations and images of what is run: more is work, and no fault
SMALL = ("training_steps=1", "seeds=[0]")
WHY = re.compile(r"error: .*('[a-z0-9_.-]+'|[a-z_]+\.[a-z_]+|diverged)")
PLACED = re.compile(r"(case\.yaml:\d+:\d+|--set)")
AXES = ("curriculum", "allocator", "selector", "tree", "sampler", "advantage", "objective", "model")
LISTS = ("reward", "tracker")


@pytest.fixture(scope="module")
def registries():
    return load_registries(plugin_manager(()))


@pytest.fixture(scope="module")
def parts(registries) -> dict[str, list[dict[str, Any]]]:
    """Every part in the box with its options at their defaults, where it has no required ones."""
    found: dict[str, list[dict[str, Any]]] = {"optimizer": [{"kind": kind} for kind in ("adamw", "adam", "sgd")]}
    for axis in (*AXES, *LISTS):
        for entry in registries.of(axis):
            fields = entry.spec.model_fields
            required = [name for name, field in fields.items() if field.is_required() and name != "kind"]
            plain = {} if required else entry.spec().model_dump(mode="json")
            found.setdefault(f"{axis}s" if axis in LISTS else axis, []).append(
                {**plain, "kind": entry.name, **dict.fromkeys(required, 2)}
            )
    return found


def drawn(tiny, parts, seed: object) -> Mutation:
    rng = random.Random(f"spec {seed}")
    return mutated({**tiny, "optimizer": {"kind": "adamw", "learning_rate": 1e-4}}, parts, rng)


@pytest.mark.parametrize("number", range(CHECKED))
def test_a_mutated_file_is_accepted_or_refused_with_its_place(warm, tiny, parts, tmp_path, pytestconfig, number):
    mutation = drawn(tiny, parts, f"{pytestconfig.getoption('--fault-seed')} {number}")
    path = tmp_path / "case.yaml"
    path.write_bytes(mutation.content)
    done = warm(["check", path.name], tmp_path, seconds=SECONDS)
    assert not done.hangs, mutation.what
    assert not done.traceback, f"{mutation.what}\n{done.out}"
    assert done.memory < MOST_MEMORY, f"{mutation.what}: {done.memory}"
    assert done.code in (0, 2), f"{mutation.what}\n{done.out}"
    assert done.code == 0 or PLACED.search(done.out), f"{mutation.what}: no place: {done.out}"


def small(experiments: dict[str, Experiment]) -> bool:
    """Whether a run of these costs little; what is accepted and costs much is no fault."""
    for arm, cost in costs(experiments).items():
        experiment = experiments[arm]
        held_out = experiment.prompts.evaluation_count * experiment.evaluation.images_per_prompt
        images = max(held_out, experiment.evaluation.images, cost.candidates)
        steps = experiment.evaluation.denoising_steps or 1
        if cost.total_work(1).high > MOST_WORK or cost.predicted.high > 500 or images * steps > 16 * MOST_IMAGES:
            return False
        if experiment.model.kind != "shapes" or images > 4 * MOST_IMAGES:
            return False
    return True


def accepted(tiny, parts, registries, path: Path, seed: object) -> Iterator[Mutation]:
    """Mutations that `check` accepts and that cost little, as files at the path."""
    for attempt in range(400):
        mutation = drawn(tiny, parts, f"{seed} {attempt}")
        path.write_bytes(mutation.content)
        with suppress(AegpoError):
            if small(dict(load_experiment_file(path, registries, SMALL).arms)):
                yield mutation


@pytest.mark.parametrize("number", range(RUN))
def test_what_is_accepted_runs_or_says_why_not(warm, tiny, parts, registries, tmp_path, pytestconfig, number):
    """A part may find out only when it is asked; then it is named, with the setting or what became of the numbers."""
    path = tmp_path / "case.yaml"
    seed = f"run {pytestconfig.getoption('--fault-seed')} {number}"
    mutation = next(accepted(tiny, parts, registries, path, seed))
    words = [word for setting in SMALL for word in ("--set", setting)]
    done = warm(["run", path.name, *words, "--jobs", "1"], tmp_path, seconds=60)
    assert not done.hangs, mutation.what
    assert not done.traceback, f"{mutation.what}\n{done.out}"
    assert done.memory < 2 * MOST_MEMORY, f"{mutation.what}: {done.memory}"
    assert done.code == 0 or says_why(done), f"{mutation.what}\n{done.code} {done.out}"


def says_why(done: Ended) -> bool:
    """Whether a run that failed is refused in words that name a part, a setting or what diverged."""
    return done.code in (1, 2) and WHY.search(done.out) is not None
