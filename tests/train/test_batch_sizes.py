"""Micro-batches that are left to the machine: what is found, that it is noted once, and that nothing else moves."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command_line import aegpo
from worlds import small_experiment, write_tiny_shapes

from aegpo.config.loading import load_experiment_file
from aegpo.core.experiment import Experiment
from aegpo.core.sections import OptimizerSpec, RolloutsSpec
from aegpo.models.shapes import ShapesSpec
from aegpo.plugin.manager import load_registries, plugin_manager
from aegpo.runs.batches import with_noted
from aegpo.runs.folders import Run
from aegpo.runs.manifest import changed_batches, read_manifest
from aegpo.runs.opening import FoundRun, common_experiment, find_run
from aegpo.runs.records import write_document
from aegpo.train import batch_sizes
from aegpo.train.batch_sizes import Trial, fewest, settled
from aegpo.train.engine import Engine

TINY = """
name: tiny
training_steps: 2
device: cpu
model: {{kind: shapes, weights: {weights}}}
prompts: {{train_count: 2, evaluation_count: 2}}
rollouts: {{prompts_per_step: 2, rollouts_per_step: 8, denoising_steps: 3, micro_batch: auto}}
rewards: [palette]
allocator: uniform
selector: uniform
tree: independent
sampler: flow-sde
advantage: group
objective: clipped
optimizer: {{micro_batch: auto}}
checkpoint: {{every: 1}}
evaluation: {{every: 2, images: 2}}
"""


def device(overhead: float, each: float, fits: int = 10**6) -> Callable[[int], float | None]:
    """States a second of a device that needs so long for a call and for each state, and has memory for so many."""
    return lambda size: None if size > fits else size / (overhead + each * size)


@pytest.mark.parametrize(
    ("rate", "most", "expected"),
    [
        (device(0.0, 1.0), 96, 1),  # a call costs nothing
        (device(10.0, 1.0), 4096, 256),  # of a rate of 1 at most 256 have .96, 128 have .93
        (device(30.0, 1.0), 96, 96),  # as many as there are
        (device(10.0, 1.0), 48, 48),
        (device(10.0, 1.0, fits=20), 96, 16),  # as many as fit
        (device(10.0, 1.0, fits=0), 96, 1),  # not even one: the run itself says so
        (device(10.0, 1.0), 1, 1),
    ],
)
def test_the_fewest_that_are_nearly_as_fast_as_any(rate, most, expected):
    assert fewest(rate, most) == expected


def test_no_more_are_tried_once_more_are_slower():
    tried = []

    def rate(size: int) -> float:
        tried.append(size)
        return {1: 50.0, 2: 90.0, 4: 100.0}.get(size, 80.0)

    assert fewest(rate, 1024) == 4
    assert tried == [1, 2, 4, 8, 16]


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return write_tiny_shapes(tmp_path_factory.mktemp("weights"))


def engine(weights: Path, micro_batch: int | str) -> Engine:
    sizes = {"prompts_per_step": 2, "rollouts_per_step": 8, "denoising_steps": 3, "micro_batch": micro_batch}
    model, optimizer = ShapesSpec(weights=weights), OptimizerSpec(micro_batch=micro_batch)
    return Engine.build(small_experiment(model, rollouts=RolloutsSpec(**sizes), optimizer=optimizer))


def test_what_is_found_learns_what_the_same_numbers_learn(weights):
    found = engine(weights, "auto")
    rollouts, optimizer = found.experiment.rollouts.micro_batch, found.experiment.optimizer.micro_batch
    assert {rollouts, optimizer} <= {1, 2, 4, 8}  # of 8 rollouts
    assert found.policy.micro_batch == rollouts
    assert all(weight.grad is None for weight in found.policy.weights.trained.values())
    told = engine(weights, 64)
    changed = {"rollouts": rollouts, "optimizer": optimizer}
    sections = {k: getattr(told.experiment, k).model_copy(update={"micro_batch": n}) for k, n in changed.items()}
    told = Engine.build(told.experiment.model_copy(update=sections))
    assert found.step(1).metrics == told.step(1).metrics
    for one, other in zip(found.policy.weights.trained.values(), told.policy.weights.trained.values(), strict=True):
        assert torch.equal(one, other)


def test_memory_for_a_few_states_is_not_overdrawn(weights, monkeypatch):
    told = engine(weights, 64)
    trial = Trial.of(told.policy, told.experiment, told.prompts[0])
    assert trial.each > 0
    room = 2.5 * trial.each
    few = Trial(told.policy, told.prompts[0], room, trial.each)
    assert few.learned(2) is not None
    assert few.learned(4) is None
    assert few.sampled(4) is None
    trained = sum(weight.numel() for weight in told.policy.weights.trained.values())
    free = int(room / batch_sizes._SHARE) + trained * 4 * 3  # gradients and two moments
    monkeypatch.setattr(batch_sizes, "free_bytes", lambda device: free)
    auto = told.experiment.model_copy(update={"optimizer": OptimizerSpec(micro_batch="auto")})
    assert settled(told.policy, auto, told.prompts[0]).optimizer.micro_batch <= 2


def test_a_shortage_amid_a_trial_ends_it_and_leaves_no_gradient(weights):
    told = engine(weights, 64)
    trial = Trial.of(told.policy, told.experiment, told.prompts[0])

    def hungry(module, args):
        if len(args[0]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    with told.policy.model.policy.register_forward_pre_hook(hungry):
        assert fewest(trial.learned, 8) <= 2
        assert trial.sampled(4) is None
    assert all(weight.grad is None for weight in told.policy.weights.trained.values())


def test_a_broken_model_is_no_shortage(weights):
    told = engine(weights, 64)
    trial = Trial.of(told.policy, told.experiment, told.prompts[0])

    def broken(module, args):
        raise RuntimeError("a bug")

    with told.policy.model.policy.register_forward_pre_hook(broken), pytest.raises(Exception, match="a bug"):
        trial.sampled(1)


def test_a_run_finds_once_and_goes_on_with_what_it_found(tmp_path, weights, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(TINY.format(weights=weights))
    folder, registries = Path("runs/tiny/main/seed-0"), load_registries(plugin_manager())
    command = ("run", "tiny.yaml", "--no-report")
    done = aegpo(*command)
    assert done.code == 0, done
    manifest = read_manifest(folder)
    noted = manifest["micro_batches"]
    assert set(noted) == {"rollouts", "optimizer"}
    assert f"rollouts.micro_batch: auto -> {noted['rollouts']}" in done.stdout
    assert manifest["experiment"]["rollouts"]["micro_batch"] == "auto"
    assert find_run(folder, registries).experiment.rollouts.micro_batch == noted["rollouts"]

    no_trial_finds = {"rollouts": 3, "optimizer": 5}
    shutil.rmtree(folder / "checkpoints" / "step-000002")
    (folder / "finished.json").unlink()
    write_document(folder / "manifest.json", {**manifest, "micro_batches": no_trial_finds})
    goes_on = aegpo(*command)
    assert goes_on.code == 0, goes_on
    assert "rollouts.micro_batch: auto -> 3, optimizer.micro_batch: auto -> 5" in goes_on.stdout
    assert read_manifest(folder)["micro_batches"] == no_trial_finds


def test_a_number_in_the_file_wins_and_one_that_was_there_before_stays(tmp_path, weights):
    file = tmp_path / "tiny.yaml"
    file.write_text(TINY.format(weights=weights))
    registries = load_registries(plugin_manager())

    def experiment(*changes: str) -> Experiment:
        return load_experiment_file(file, registries, changes).experiment("main", 0)

    auto, number = experiment(), experiment("rollouts.micro_batch=7")
    noted = {"experiment": auto.model_dump(mode="json"), "micro_batches": {"rollouts": 2, "optimizer": 4}}
    assert with_noted(auto, noted).rollouts.micro_batch == 2
    assert with_noted(number, noted).rollouts.micro_batch == 7
    assert with_noted(number, noted).optimizer.micro_batch == 4
    begun_with_it = {"experiment": number.model_dump(mode="json")}
    assert with_noted(auto, begun_with_it).rollouts.micro_batch == 7
    run = Run("main", 0, auto, tmp_path)
    assert changed_batches(run, begun_with_it) == []
    assert with_noted(auto, {"experiment": auto.model_dump(mode="json")}) == auto


def test_seeds_that_found_other_numbers_are_one_arm(tmp_path, weights):
    file = tmp_path / "tiny.yaml"
    file.write_text(TINY.format(weights=weights))
    found = load_experiment_file(file, load_registries(plugin_manager())).experiment("main", 0)
    runs = []
    for seed, number in enumerate((8, 16)):
        rollouts = found.rollouts.model_copy(update={"micro_batch": number})
        experiment = found.model_copy(update={"seed": seed, "rollouts": rollouts})
        runs.append(FoundRun(tmp_path / str(seed), "main", seed, experiment, 2, (2,)))
    assert common_experiment(runs) == runs[0].experiment
