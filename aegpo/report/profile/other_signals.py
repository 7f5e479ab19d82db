"""Signals beside entropy, measured on the profiled prompts, so that they can be validated next to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from aegpo.core import contracts
from aegpo.core.experiment import Experiment
from aegpo.core.parts import SignalSpec
from aegpo.core.records import FloatArray, Prompt
from aegpo.core.registry import suggestion
from aegpo.core.signals import Signals
from aegpo.errors import AegpoError
from aegpo.method.planning import LATE
from aegpo.train.engine import Engine


@dataclass(frozen=True)
class OtherSignals:
    """What signals say about P prompts, by their names as predictors."""

    by_step: dict[str, FloatArray]  # (P, T)
    by_prompt: dict[str, FloatArray]  # (P,)


def source_of(experiment: Experiment, name: str) -> SignalSpec:
    """The source of a signal that the command line names.

    Raises:
        AegpoError: if there is none; the message has the nearest names.
    """
    source = experiment.source(name)
    if source is None:
        known = {signal for each in experiment.registered_signals.values() for signal in each.provides}
        raise AegpoError(f"--signal {name}: no source provides it; {suggestion(name, known)}")
    return source


def measure_signals(engine: Engine, prompts: Sequence[Prompt], names: Sequence[str]) -> OtherSignals:
    """Measures signals of the engine's present policy, as many prompts at a time as a training step has.

    Raises:
        AegpoError: if one is not known of every prompt, as of rewards that were never asked for.
    """
    experiment, found = engine.experiment, OtherSignals({}, {})
    each = experiment.rollouts.prompts_per_step
    for name in names:
        spec = source_of(experiment, name)
        parts = []
        with contracts.blaming("signals", spec.kind):
            source = engine.sources.built.get(spec.kind) or spec.build(experiment)
            for first in range(0, len(prompts), each):
                part = prompts[first : first + each]
                with torch.no_grad():
                    measured = source.measure(LATE, part, engine.policy)
                asked = Signals(LATE, len(part), experiment.sigmas)
                contracts.check_measurement(spec.kind, spec.provides, measured, asked)
                parts.append(measured.values[name])
        per = spec.provides[name]
        table = np.tile(parts[0], (len(prompts), 1)) if per == "step" else np.concatenate(parts)
        if np.isnan(table).any():
            what = "prompts" if per == "prompt" else "steps"
            raise AegpoError(f"--signal {name}: it is not known of all {what} here, so nothing can be said about it")
        (found.by_prompt if per == "prompt" else found.by_step)[f"signal {name}"] = table
    return found
