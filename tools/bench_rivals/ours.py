"""aegpo's side: the experiment that does what a rival does, and its gradient from what the rival sampled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aegpo.config.loading import load_experiment_file
from aegpo.core.experiment import Experiment
from aegpo.core.records import Rollouts
from aegpo.models.pipeline.packing import unpack
from aegpo.plugin.manager import load_registries, plugin_manager
from aegpo.train.engine import Engine
from aegpo.train.tally import Tally
from bench_rivals.cases import (
    FIRST,
    LEARNING_RATE,
    MOST_GRADIENT,
    PROMPTS,
    STEPS,
    WEIGHT_DECAY,
    Case,
)
from bench_rivals.first import First, relative_difference
from bench_rivals.models import PIXELS
from bench_rivals.serving import Server


def train(case: Case, server: Server) -> None:
    """Training steps, one whenever it is wanted."""
    engine = Engine.build(experiment(case))
    number = 0
    server.boundary()
    if (case.shared / FIRST).exists() and case.updates == 1:
        server.say(gradient=gradient_difference(engine, First.load(case.shared / FIRST)))
    while True:
        number += 1
        engine.step(number)
        server.boundary()


def experiment(case: Case) -> Experiment:
    """The experiment of a case; its method is in the file that the parent wrote."""
    registries = load_registries(plugin_manager([str(Path(__file__).with_name("plugin.py"))]))
    (found,) = load_experiment_file(case.folder / "experiment.yaml", registries).arms.values()
    return found


def write_experiment(case: Case, method: Mapping[str, Any]) -> None:
    """Writes it; `method` are the sections in which methods differ."""
    optimizer: dict[str, Any] = {
        "learning_rate": LEARNING_RATE,
        "weight_decay": WEIGHT_DECAY,
        "max_grad_norm": MOST_GRADIENT,
        "rollouts_per_update": case.per_update,
    }
    if case.retain is not None:
        optimizer["retain"] = case.retain
    common: dict[str, Any] = {
        "training_steps": 1000,
        "device": case.device,
        "model": {
            "path": str(case.model),
            "dtype": "float32",
            "height": PIXELS,
            "width": PIXELS,
            "gradient_checkpointing": False,
            "cache": str(case.folder / "cache"),
        },
        "rewards": [{"kind": "mean-pixel"}],
        "prompts": {"train": str(case.prompt_file), "evaluation": str(case.shared / "held_out.txt")},
        "rollouts": {
            "prompts_per_step": len(PROMPTS),
            "rollouts_per_step": case.rollouts,
            "denoising_steps": STEPS,
        },
        "selector": {"kind": "uniform", "last": False},
        "tree": "independent",
        "policy": {"train": "full"},
        "optimizer": optimizer,
    }
    for section, given in method.items():
        inherited = common.get(section)
        common[section] = {**inherited, **given} if isinstance(inherited, dict) and "kind" not in inherited else given
    (case.folder / "experiment.yaml").write_text(json.dumps(common, indent=1))


def gradient_difference(engine: Engine, first: First) -> float:
    """Relative L2 difference of aegpo's gradient of the whole loss from the rival's, on what the rival sampled."""
    found = dict[str, Tensor]()

    def instead(sampled: Any, credit: Tensor, cond: Any, rng: Any, noise: Any, *rest: Any) -> Tally:
        rollouts, advantages, text_of = _stored(sampled.whole, first, credit)
        asked = [prompt.text for prompt in engine.asked(1)]
        chosen = cond.select(torch.tensor([asked.index(text) for text in text_of], device=credit.device))
        parts = engine.learner.gradients(rollouts, advantages, chosen, noise)
        found.update(zip(engine.learner.weights.trained, parts, strict=True))
        tally = Tally()
        tally.add("updated_edges", 0.0)
        return tally

    before = engine.learner.update
    engine.learner.update = instead  # type: ignore[method-assign, assignment]
    try:
        engine.step(1)
    finally:
        engine.learner.update = before  # type: ignore[method-assign]
    return relative_difference(found, first.gradients)


def _stored(own: Rollouts, first: First, credit: Tensor) -> tuple[Rollouts, Tensor, list[str]]:
    """The plan's rollouts with a rival's states and advantages in place of their own, and each group's prompt."""
    edges, count = own.edges, len(first.texts)
    assert first.latents is not None
    assert first.next_latents is not None
    assert first.log_prob is not None
    assert first.advantage is not None
    order = sorted(range(count), key=lambda row: first.texts[row])
    size = count // len(PROMPTS)
    row = torch.tensor(order)[edges.rollout.cpu()]
    column = torch.tensor([first.levels.index(level) for level in edges.level.tolist()])
    shape, device = edges.states.shape[1:], credit.device

    def states(stored: Tensor, scale: Tensor) -> Tensor:
        chosen = (stored[row, column].double() / scale.view(-1, *(1 for _ in stored.shape[2:]))).float()
        return (chosen if chosen.ndim == len(shape) + 1 else unpack(chosen, shape[1], shape[2])).to(device)

    scale = torch.ones(STEPS + 1, dtype=torch.float64) if first.scale is None else first.scale
    before, after = scale[edges.level.cpu()], scale[1 + edges.level.cpu()]
    every = torch.arange(len(edges), device=device)  # no siblings: each transition has a state of its own
    changed = replace(
        edges,
        begin=every,
        end=len(edges) + every,
        states=torch.cat([states(first.latents, before), states(first.next_latents, after)]),
        log_prob=(first.log_prob[row, column] + after.log()).float().to(device),
    )
    texts = [first.texts[order[start]] for start in range(0, count, size)]
    return replace(own, edges=changed), first.advantage[row].float().to(device), texts
