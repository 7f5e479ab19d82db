"""What `aegpo check` says about memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from worlds import CPU, asked, small_experiment

from aegpo.commands import describe
from aegpo.core.footprint import Footprint
from aegpo.core.phases import phases
from aegpo.core.sections import OptimizerSpec, PolicySpec, RolloutsSpec
from aegpo.method.objectives import PreferenceObjective
from aegpo.models.adapters import add_adapters
from aegpo.models.flux import FluxSpec
from aegpo.models.sd import SdSpec
from aegpo.models.sd3 import Sd3Spec
from aegpo.models.sdxl import SdxlSpec
from aegpo.models.shapes import ShapesSpec
from aegpo.parallel.sharding import units_of
from aegpo.runs.manifest import experiment_changes
from aegpo.train import policy as policy_module
from aegpo.train.policy import Policy

LORA = PolicySpec(train="lora", rank=4)
ROLLOUTS = {"prompts_per_step": 1, "rollouts_per_step": 4, "denoising_steps": 4}


def needs(spec, policy=LORA, micro_batch=1) -> Footprint:
    experiment = small_experiment(spec, policy=policy, optimizer=OptimizerSpec(micro_batch=micro_batch))
    return spec.footprint(experiment)


@pytest.mark.parametrize(
    ("spec", "parameters"),
    [
        (SdSpec, 859_520_964),  # the published UNets and transformers, counted in their checkpoints
        (SdxlSpec, 2_567_463_684),
        (FluxSpec, 11_901_408_320),
    ],
)
def test_published_networks_are_counted_without_a_download(spec, parameters):
    found = needs(spec(path="nobody/has-this"))
    assert found.parameters - found.trainable == parameters
    assert found.weights > 2 * parameters


@pytest.mark.parametrize("spec", [SdSpec, SdxlSpec, Sd3Spec, FluxSpec])
def test_a_folder_is_counted_as_it_is_trained(spec, pipeline_folders):
    kind = spec.model_fields["kind"].default
    chosen = spec(path=str(pipeline_folders[kind]), dtype="float32", height=16, width=16)
    model = chosen.build(CPU)
    add_adapters(model.policy, LORA, chosen.adapter_targets)
    found, counts = needs(chosen), [(w.numel(), w.requires_grad) for w in model.policy.parameters()]
    assert found.parameters == sum(count for count, _ in counts)
    assert found.trainable == sum(count for count, trained in counts if trained)
    assert found.optimizer == 3 * 4 * found.trainable


def test_needs_grow_with_what_is_asked_for(pipeline_folders):
    fields = {"path": str(pipeline_folders["sd3"]), "dtype": "float32"}
    small = Sd3Spec(height=16, width=16, gradient_checkpointing=False, guidance=1.0, **fields)
    checkpointed = small.model_copy(update={"gradient_checkpointing": True})
    assert needs(small, micro_batch=3).activations == 3 * needs(small).activations
    preferring = {"policy": LORA, "objective": PreferenceObjective(), "optimizer": OptimizerSpec(micro_batch=1)}
    groups = small.footprint(small_experiment(small, **preferring))  # of 4 rollouts each
    assert groups.activations == 4 * needs(small).activations
    assert needs(checkpointed).activations < needs(small).activations
    assert needs(small.model_copy(update={"guidance": 2.0})).activations == 2 * needs(small).activations
    assert needs(small.model_copy(update={"height": 32, "width": 32})).activations > needs(small).activations
    full, offloaded = PolicySpec(), small.model_copy(update={"offload_base": True})
    assert needs(small, full).trainable == needs(small, full).parameters
    assert needs(small, full).weights - needs(offloaded, full).weights == 4 * needs(small, full).trainable
    average = needs(small, PolicySpec(ema=0.9)).optimizer
    assert average * 3 == needs(small, full).optimizer * 4
    for momentum, moments in ((0.9, 1), (0.0, 0)):
        descent = OptimizerSpec(micro_batch=1, kind="sgd", momentum=momentum)
        plain = small.footprint(small_experiment(small, policy=full, optimizer=descent)).optimizer
        assert plain == (1 + moments) * 4 * needs(small, full).trainable  # the gradient, and what is kept of it
    eight = small_experiment(small, policy=full, optimizer=OptimizerSpec(micro_batch=1, moments="8bit"))
    saved = needs(small, full).optimizer - small.footprint(eight).optimizer
    large = [w.numel() for w in small.build(CPU).policy.parameters() if w.numel() >= 4096]
    assert saved == sum(6 * count - 8 * -(-count // 256) for count in large) > 0


def test_the_estimate_of_activations_is_near_what_autograd_keeps(pipeline_folders):
    """The tensors autograd saves, weights left out, against the estimate; within a factor of two."""
    fields = {"path": str(pipeline_folders["sd3"]), "dtype": "float32", "height": 16, "width": 16, "guidance": 1.0}
    spec = Sd3Spec(gradient_checkpointing=False, **fields)
    model = spec.build(CPU)
    model.policy.requires_grad_(True)
    weights = {weight.data_ptr() for weight in model.policy.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor):
        if tensor.data_ptr() not in weights:
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        velocity = model.velocity(
            torch.zeros(1, *model.latent_shape), torch.tensor([0.5]), model.encode(asked(["a cube"]))
        )
    assert velocity.requires_grad
    estimate = spec.footprint(small_experiment(spec, optimizer=OptimizerSpec(micro_batch=1))).activations
    # the estimate takes CLIP's published 77 tokens; the small pipeline has 12
    tokens = (77 + 256 + 16) / (12 + 256 + 16)
    assert 0.5 < estimate / (tokens * sum(kept.values())) < 2


def test_flux_on_several_gpus_is_as_by_hand():
    """Full fine-tuning, by arithmetic: 27 GB of states a GPU of 8 while it learns, 45 with all of it in bfloat16."""
    width, tokens = 3072, 4  # the feed-forward is so many times as wide
    linear = width * width + width
    stream = 4 * linear + 2 * tokens * width**2 + (tokens + 1) * width + 6 * linear + 2 * 128
    single = 3 * linear + (width + 1) * tokens * width + (tokens + 1) * width**2 + width + 3 * linear + 2 * 128
    count, decoder = 11_901_408_320, 4 * 84_000_000
    outside = count - 19 * 2 * stream - 38 * single
    assert 0 < outside < 100_000_000
    found = needs(FluxSpec(path="nobody/has-this"), PolicySpec())
    few = found.activations + 2 * outside + 3 * 2 * 2 * stream
    for processes, learning, painting in ((8, 27, 45), (16, 13, 34)):
        by_phase = phases(found, processes, "sharded")
        training, sampling = (4 + 2 + 4 + 8) * count / processes, (4 + 2 + 8) * count / processes + 2 * count
        assert (round(training / 1e9), round(sampling / 1e9)) == (learning, painting)
        assert by_phase.training == pytest.approx(training + decoder + few, abs=8)
        assert by_phase.sampling == pytest.approx(sampling + decoder + found.shares.sampling, abs=8)
        average = phases(replace(found, optimizer=found.optimizer + 4 * count), processes, "sharded")
        assert round(sampling / 1e9 + (average.sampling - by_phase.sampling) / 1e9) in {painting + 6, painting + 3}


def test_all_weights_are_gathered_in_the_dtype_of_the_arithmetic(pipeline_folders):
    spec = Sd3Spec(path=str(pipeline_folders["sd3"]), dtype="float32", height=16, width=16)
    low = spec.model_copy(update={"dtype": "bfloat16"})
    blocks = [sum(weight.numel() for weight in unit.parameters()) for unit in units_of(spec.build(CPU).policy)]
    assert needs(spec, PolicySpec()).shares.block == 4 * max(blocks)
    assert needs(spec, PolicySpec()).shares.outside == 4 * (needs(spec, PolicySpec()).parameters - sum(blocks))
    for policy in (PolicySpec(), PolicySpec(ema=0.9), LORA):
        high, half = needs(spec, policy), needs(low, policy)
        assert high.shares.network == 4 * high.parameters
        assert half.shares.network == 2 * half.parameters
        assert high.shares.block == 2 * half.shares.block


def test_what_cannot_be_shared_says_so(pipeline_folders):
    spec = Sd3Spec(path=str(pipeline_folders["sd3"]), dtype="float32", height=16, width=16)
    assert needs(spec, PolicySpec()).shares.base == 4 * needs(spec, PolicySpec()).trainable
    assert needs(spec).shares.base == 0
    offloaded = spec.model_copy(update={"offload_base": True})
    assert needs(offloaded, PolicySpec()).shares is None
    assert needs(offloaded).shares == needs(spec).shares  # with adapters there is no copy
    eight = small_experiment(spec, policy=PolicySpec(), optimizer=OptimizerSpec(moments="8bit"))
    assert spec.footprint(eight).shares is None


def test_sampling_needs_no_more_than_its_micro_batch(pipeline_folders):
    spec = Sd3Spec(path=str(pipeline_folders["sd3"]), dtype="float32", height=16, width=16)
    one, three = (
        spec.footprint(small_experiment(spec, policy=LORA, rollouts=RolloutsSpec(**ROLLOUTS, micro_batch=size)))
        for size in (1, 3)
    )
    assert three.shares.sampling == 3 * one.shares.sampling > 0
    assert one.shares.sampling < one.whole


def test_the_table_says_what_does_not_fit():
    figures = {"small": Footprint(10, 1, 2**30, 2**30, 2**30), "large": Footprint(10, 1, 2**34, 2**30, 2**30)}
    console = Console(width=160, record=True)
    console.print(describe.memory(figures, 2**32))
    text = console.export_text()
    small, large = (next(line for line in text.splitlines() if arm in line) for arm in ("small", "large"))
    assert "3.0" in small
    assert "yes" in small
    assert "18.0" in large
    assert "no" in large
    assert "the GPU has 4.0" in text
    assert ShapesSpec().footprint(small_experiment(ShapesSpec())) is None


def test_activations_are_computed_again_only_where_they_would_not_fit(pipeline_folders):
    fields = {"path": str(pipeline_folders["sd3"]), "dtype": "float32", "height": 16, "width": 16}
    spec, whole = Sd3Spec(**fields), Sd3Spec(gradient_checkpointing=False, **fields)
    experiment = small_experiment(spec, policy=LORA)
    enough = spec.footprint(experiment).whole_from
    assert spec.settled(experiment, enough).gradient_checkpointing is False
    assert spec.settled(experiment, enough - 1).gradient_checkpointing is True
    assert spec.footprint(experiment).on(enough).total == whole.footprint(experiment).total
    assert whole.settled(experiment, 0) == whole


def test_graphs_that_sampling_keeps_need_room_of_their_own(pipeline_folders):
    spec = Sd3Spec(path=str(pipeline_folders["sd3"]), dtype="float32", height=16, width=16)

    def needed(retain) -> int:
        return spec.footprint(small_experiment(spec, policy=LORA, optimizer=OptimizerSpec(retain=retain))).whole_from

    assert needed("never") < needed("auto")
    assert needed(4.0) - needed("never") == pytest.approx(2**32 / 0.8, abs=2)
    preferring = small_experiment(spec, policy=LORA, objective=PreferenceObjective())
    assert preferring.retained_bytes == 0  # what compares whole groups keeps none


@pytest.mark.parametrize(("gib", "chosen"), [(1e6, False), (0.0, True)])
def test_the_machine_decides_when_the_parts_are_built_and_says_so(pipeline_folders, monkeypatch, gib, chosen):
    spec = Sd3Spec(path=str(pipeline_folders["sd3"]), dtype="float32", height=16, width=16)
    monkeypatch.setattr(policy_module, "free_bytes", lambda device: int(gib * 2**30))
    policy = Policy(small_experiment(spec, policy=LORA))
    assert policy.model.policy.is_gradient_checkpointing == chosen
    assert policy.experiment.model.gradient_checkpointing == "auto"  # manifests have what the file says
    (line,) = policy.choices
    assert line == f'model.gradient_checkpointing: "auto" -> {str(chosen).lower()}, with {gib:.1f} GiB free'


def test_a_run_goes_on_with_another_choice_of_checkpointing(pipeline_folders):
    spec = Sd3Spec(path=str(pipeline_folders["sd3"]), dtype="float32", height=16, width=16)
    begun = small_experiment(spec.model_copy(update={"gradient_checkpointing": True}))
    changes = experiment_changes(small_experiment(spec), {"experiment": begun.model_dump(mode="json")})
    (change,) = (each for each in changes if each.key == "model.gradient_checkpointing")
    assert change.is_allowed


def test_the_table_says_what_is_computed_again_and_what_sampling_keeps():
    sizes = (10, 1, 2**30, 2**30, 2**30)
    figures = {
        "decided": Footprint(*sizes, recomputes=True, whole=2**33, whole_from=2**34, retained=None),
        "given": Footprint(*sizes, recomputes=False, retained=2**31),
    }

    def row(arm: str, room: int | None) -> str:
        console = Console(width=200, record=True)
        console.print(describe.memory(figures, room))
        return next(line for line in console.export_text().splitlines() if arm in line)

    assert "auto: no from 16.0" in row("decided", None)
    assert "half of the rest" in row("decided", None)
    assert "yes; auto: no from 16.0" in row("decided", 2**33)
    assert "<= 2.5" in row("decided", 2**33)  # half of 8 less 3
    assert "<= 2.0" in row("given", None)
    assert "5.0" in row("given", None)  # 3, and what sampling keeps


@pytest.mark.slow
def test_check_prints_it_for_real_models_and_loads_no_torch_for_the_embedded_one(pipeline_folders, tmp_path):
    (tmp_path / "a.txt").write_text("a red circle\n")
    (tmp_path / "b.txt").write_text("a blue circle\n")
    model = {"kind": "sd", "path": str(pipeline_folders["sd"]), "height": 16, "width": 16}
    parts = {"allocator": "uniform", "selector": "uniform", "tree": "independent", "sampler": "flow-sde"}
    parts |= {"advantage": "group", "objective": "clipped", "rewards": ["palette"], "policy": {"train": "lora"}}
    parts |= {"rollouts": {"prompts_per_step": 1}}
    prompts = {"train": str(tmp_path / "a.txt"), "evaluation": str(tmp_path / "b.txt")}
    (tmp_path / "sd.yaml").write_text(json.dumps({"model": model, "prompts": prompts, **parts}))
    words = [sys.executable, "-m", "aegpo", "check", str(tmp_path / "sd.yaml")]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert "What it needs in memory" in done.stdout
    assert "no GPU here" in done.stdout
