"""Real pipelines through the whole engine: entropies, rollouts, learning, checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel
from safetensors.torch import load_file
from worlds import CPU, asked, run_loop, small_experiment

from aegpo.core.experiment import EvaluationSpec
from aegpo.core.sections import PolicySpec, PromptsSpec
from aegpo.method.allocators import EntropyAllocator
from aegpo.method.selectors import EntropyPeakSelector
from aegpo.method.signals import EntropySignal
from aegpo.method.trees import BranchingTree
from aegpo.models.adapters import add_adapters
from aegpo.models.flux import FluxSpec
from aegpo.models.sd import SdSpec
from aegpo.models.sd3 import Sd3Spec
from aegpo.models.sdxl import SdxlSpec
from aegpo.train.engine import Engine

SPECS = {"sd": SdSpec, "sdxl": SdxlSpec, "sd3": Sd3Spec, "flux": FluxSpec}
BLOCKS = {"sd": "cross", "sdxl": "self", "sd3": "joint", "flux": "joint"}
TRAIN = ["a red circle", "two blue squares", "a green cube on the left", "four purple circles"]
HELD_OUT = ["a blue circle", "two red squares"]


@pytest.fixture
def prompts(tmp_path) -> PromptsSpec:
    files = {}
    for name, texts in (("train", TRAIN), ("evaluation", HELD_OUT)):
        files[name] = tmp_path / f"{name}.txt"
        files[name].write_text("\n".join(texts))
    return PromptsSpec(**files)


@pytest.fixture
def casts(caplog) -> Iterator[pytest.LogCaptureFixture]:
    """What diffusers says where a whole network is cast to another dtype, whatever other tests made it say."""
    logger = logging.getLogger("diffusers.models.modeling_utils")
    before = logger.level
    logger.setLevel(logging.WARNING)
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)
    logger.setLevel(before)


def guided_spec(kind, folder, **fields):
    guidance = {"true_guidance": 2.0} if kind == "flux" else {"guidance": 2.0}
    return SPECS[kind](**{"path": str(folder), "height": 16, "width": 16, "dtype": "float32"} | guidance | fields)


def experiment_of(kind, folder, prompts, **changes):
    fields = {
        "model": guided_spec(kind, folder),
        "training_steps": 2,
        "prompts": prompts,
        "allocator": EntropyAllocator(low=2, high=6, warmup=0),
        "selector": EntropyPeakSelector(top_k=2),
        "tree": BranchingTree(),
        "policy": PolicySpec(train="lora", rank=2, alpha=4),
        "signals": {"entropy": EntropySignal(block=BLOCKS[kind])},
        "evaluation": EvaluationSpec(every=2, images=1),
    }
    return small_experiment(**fields | changes)


@pytest.mark.parametrize("kind", list(SPECS))
def test_two_steps_of_aegpo_move_the_adapters_and_nothing_else(kind, pipeline_folders, prompts):
    engine = Engine.build(experiment_of(kind, pipeline_folders[kind], prompts))
    before = {name: weight.clone() for name, weight in engine.policy.model.policy.named_parameters()}
    reports = [engine.step(1), engine.step(2)]
    for report in reports:
        assert np.isfinite(list(report.metrics.values())).all()
        assert report.metrics["ratio_error"] < 1e-3
        assert report.signals["entropy"].values.shape == (2, 4)
        assert (report.signals["entropy"].values > 0).all()
        assert report.counts.sum() == 8
    assert float(reports[1].signals["entropy-delta"].values.max()) > 0  # the policy has left the base
    moved = {name for name, w in engine.policy.model.policy.named_parameters() if not torch.equal(w, before[name])}
    assert moved
    assert all("lora_" in name for name in moved)


@pytest.mark.parametrize("kind", ["sd", "sd3"])
def test_full_fine_tuning_in_bfloat16_moves_float32_weights(kind, pipeline_folders, prompts, casts):
    changes = {"policy": PolicySpec(), "model": guided_spec(kind, pipeline_folders[kind], dtype="bfloat16")}
    engine = Engine.build(experiment_of(kind, pipeline_folders[kind], prompts, **changes))
    before = {name: weight.clone() for name, weight in engine.policy.model.policy.named_parameters()}
    report = engine.step(1)
    assert np.isfinite(list(report.metrics.values())).all()
    assert all(weight.dtype == torch.float32 for weight in engine.policy.model.policy.parameters())
    with engine.policy.model._network._base.active() as base:
        assert {weight.dtype for weight in base.parameters()} == {torch.bfloat16}
    assert casts.text == ""
    assert any(not torch.equal(w, before[name]) for name, w in engine.policy.model.policy.named_parameters())


def test_the_base_and_an_exported_pipeline_keep_in_float32_what_the_loader_does(
    pipeline_folders, tmp_path, monkeypatch, casts
):
    monkeypatch.setattr(SD3Transformer2DModel, "_keep_in_fp32_modules", ["norm_out"])
    spec = guided_spec("sd3", pipeline_folders["sd3"], dtype="bfloat16")
    model = spec.build(CPU)
    add_adapters(model.policy, PolicySpec())
    with model._network.base(), model._network._base.active() as base:
        kept = {name for name, weight in base.named_parameters() if weight.dtype == torch.float32}
    assert kept == {"norm_out.linear.weight", "norm_out.linear.bias"}
    model.save_pipeline(tmp_path / "to")
    saved = load_file(tmp_path / "to" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {name for name, weight in saved.items() if weight.dtype == torch.float32} == kept
    assert casts.text == ""


@pytest.mark.parametrize("kind", ["sd", "sd3"])
def test_a_resumed_run_has_the_same_weights_bit_for_bit(kind, pipeline_folders, prompts, tmp_path):
    experiment = experiment_of(kind, pipeline_folders[kind], prompts, training_steps=4)
    straight = Engine.build(experiment)
    run_loop(straight, tmp_path / "straight")
    first = Engine.build(experiment)
    run_loop(first, tmp_path / "broken", should_stop=iter([False, False, True]).__next__)
    second = Engine.build(experiment)
    run_loop(second, tmp_path / "broken")
    for name, weight in straight.policy.weights.trained.items():
        assert torch.equal(weight, second.policy.weights.trained[name])


def test_evaluation_has_its_own_size_and_steps(pipeline_folders, prompts):
    evaluation = EvaluationSpec(every=2, images=1, denoising_steps=7, height=24, width=32)
    experiment = experiment_of("flux", pipeline_folders["flux"], prompts, evaluation=evaluation)
    engine = Engine.build(experiment)
    seen = []
    engine.policy.model.policy.register_forward_pre_hook(
        lambda module, args, given: seen.append((float(given["timestep"][0]), len(given["img_ids"]))), with_kwargs=True
    )
    images = engine.policy.images(asked(HELD_OUT), engine.policy.evaluation_noise(asked(HELD_OUT)))
    assert images.shape == (2, 3, 24, 32)
    assert {tokens for _, tokens in seen} == {6 * 8}
    levels = guided_spec("flux", pipeline_folders["flux"], height=24, width=32).sigmas(7)[:-1]
    assert np.allclose(sorted({level for level, _ in seen}, reverse=True), levels, atol=1e-6)


def test_only_prompts_that_the_run_will_see_are_encoded(pipeline_folders, prompts, tmp_path):
    model = guided_spec("sd3", pipeline_folders["sd3"], cache=tmp_path / "cache")
    experiment = experiment_of("sd3", pipeline_folders["sd3"], prompts, model=model, training_steps=1)
    assert experiment.rollouts.prompts_per_step == 2 < len(TRAIN)
    engine = Engine.build(experiment)
    nothing = 1  # of guidance
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 2 + len(HELD_OUT) + nothing
    engine.policy.model._prompts._embed = None  # nothing is left to encode
    run_loop(engine, tmp_path / "run")
