"""torch.compile of pipelines' networks: the same numbers, names and files as without."""

from __future__ import annotations

import pytest
import torch
from test_training import experiment_of, guided_spec, prompts  # noqa: F401 - a fixture
from worlds import CPU

from aegpo.core.sections import PolicySpec
from aegpo.method.trees import IndependentTree
from aegpo.models.adapters import add_adapters
from aegpo.models.pipeline.compiling import compile_blocks, eagerly
from aegpo.models.pipeline.saving import merged
from aegpo.models.pipeline.source import missing_compiler
from aegpo.train.engine import Engine

needs_compiler = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))
BLOCKS = {"sd": "BasicTransformerBlock", "sdxl": "BasicTransformerBlock", "sd3": "JointTransformerBlock"}


def compiled_blocks(network):
    return [module for module in network.modules() if module._compiled_call_impl is not None]


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3", "flux"])
def test_blocks_are_compiled_and_neither_names_nor_copies_show_it(kind, pipeline_folders):
    plain = guided_spec(kind, pipeline_folders[kind]).build(CPU)
    model = guided_spec(kind, pipeline_folders[kind], compile=True).build(CPU)
    assert not compiled_blocks(plain.policy)
    kinds = {type(module).__name__ for module in compiled_blocks(model.policy)}
    assert kinds == ({BLOCKS[kind]} if kind in BLOCKS else {"FluxTransformerBlock", "FluxSingleTransformerBlock"})
    assert list(model.policy.state_dict()) == list(plain.policy.state_dict())
    assert not compiled_blocks(merged(model.policy))
    add_adapters(model.policy, PolicySpec())
    with model._network._base.active() as base:
        assert not compiled_blocks(base)


def test_a_network_without_blocks_is_compiled_whole_and_eager_inside_eagerly():
    network = torch.nn.Sequential(torch.nn.Linear(2, 2))
    compile_blocks(network)
    assert compiled_blocks(network) == [network]
    seen = []
    network[0].register_forward_hook(lambda *_: seen.append(torch.compiler.is_compiling()))
    with eagerly():
        network(torch.zeros(1, 2))
    assert seen == [False]


@needs_compiler
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_compiled_run_steps_as_an_eager_one(pipeline_folders, prompts, tmp_path):  # noqa: F811
    """A step of AEGPO: the probe taps the network, rollouts and update run compiled."""
    reports, engines = [], []
    for compiled in (False, True):
        model = guided_spec("sd3", pipeline_folders["sd3"], compile=compiled, guidance=1.0)
        changes = {"policy": PolicySpec(train="lora", rank=2, alpha=4, ema=0.5), "tree": IndependentTree()}
        engine = Engine.build(experiment_of("sd3", pipeline_folders["sd3"], prompts, model=model, **changes))
        reports.append(engine.step(1))
        engines.append(engine)
    eager, compiled = reports
    assert (eager.signals["entropy"].values == compiled.signals["entropy"].values).all()  # measured eagerly in both
    assert (eager.counts == compiled.counts).all()
    for name, value in eager.metrics.items():
        assert compiled.metrics[name] == pytest.approx(value, rel=1e-2, abs=1e-4), name
    state, other = (engine.learner.state_dict() for engine in engines)
    assert state.keys() == other.keys()
    for name, value in state.items():
        if name.startswith(("policy/", "ema/")):
            torch.testing.assert_close(other[name], value, rtol=1e-2, atol=1e-4)
    frames = torch._dynamo.utils.counters["frames"]
    assert frames["ok"] > 0


def test_a_missing_compiler_is_found_when_the_file_is_checked(pipeline_folders, prompts, monkeypatch, tmp_path):  # noqa: F811
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    spec = guided_spec("sd3", pipeline_folders["sd3"], compile=True)
    told = (
        "model 'sd3': 'compile' needs a C++ compiler, and there is no g++, clang++, c++; install one, or leave "
        "'compile' out"
    )

    def messages(model):
        experiment = experiment_of("sd3", pipeline_folders["sd3"], prompts, model=model)
        return [problem.message for problem in experiment.problems()]

    assert told in messages(spec)
    assert told not in messages(spec.model_copy(update={"compile": False}))
    monkeypatch.setenv("CXX", "nowhere-g++")
    assert missing_compiler().startswith("'compile' needs a C++ compiler, and CXX names 'nowhere-g++', which is not")
