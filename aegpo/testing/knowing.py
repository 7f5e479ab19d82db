"""Conformance of what is known before rollouts are planned: sources of signals, and curricula that choose by them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from aegpo.core import contracts
from aegpo.core.interfaces import Curriculum, SignalSource
from aegpo.core.parts import CurriculumSpec, SignalSpec
from aegpo.core.records import Prompt, Signal
from aegpo.core.sections import RolloutsSpec
from aegpo.core.signals import Measurement, Signals
from aegpo.core.signatures import built
from aegpo.errors import ContractError
from aegpo.testing.common import check_equal, check_spec, decision_rng
from aegpo.testing.decisions import experiment_with

_PROMPTS = ("a red circle", "two blue squares", "three green triangles on a yellow background")
_LISTS = ((8, 2), (9, 4), (5, 5))  # prompts of a list, and of a step
_STEPS = 6  # of training


def check_signal(spec: SignalSpec, prompts: Sequence[str | Prompt] = _PROMPTS) -> None:
    """Every signal it provides, shaped as it says, and the same from a second source; on the embedded model.

    Args:
        spec: of the source.
        prompts: that it is asked about.
    """
    import torch

    from aegpo.prompts.lists import numbered
    from aegpo.train.policy import Policy

    check_spec(spec)
    asked = numbered(prompts)
    rollouts = RolloutsSpec(prompts_per_step=len(asked), rollouts_per_step=8 * len(asked), denoising_steps=4)
    experiment = experiment_with(rollouts, source=spec)
    policy, signals = Policy(experiment), Signals(1, len(asked), experiment.sigmas)

    def measured() -> Measurement:
        source = built("signals", spec.kind, partial(spec.build, experiment), SignalSource)
        with contracts.blaming("signals", spec.kind), torch.no_grad():
            found = source.measure(1, asked, policy)
        contracts.check_measurement(spec.kind, spec.provides, found, signals)
        return found

    one, other = measured(), measured()
    for name, values in one.values.items():
        if not np.array_equal(values, other.values[name], equal_nan=True):
            raise ContractError(f"signals {spec.kind!r} returned something else for the same prompts and policy")


def check_curriculum(spec: CurriculumSpec) -> None:
    """Prompts of the list, all of them candidates, whatever is known of them; and deterministic."""
    check_spec(spec)
    for prompts, per_step in _LISTS:
        one, other = (
            built("curriculum", spec.kind, partial(spec.build, prompts, per_step, 0), Curriculum) for _ in range(2)
        )
        with contracts.blaming("curriculum", spec.kind):
            candidates = set(one.candidates(_STEPS).tolist())
        for step in range(1, _STEPS + 1):
            known = _known(spec, step, prompts)
            with contracts.blaming("curriculum", spec.kind):
                chosen = one.choose(known, per_step, decision_rng())
                contracts.check_choice(spec.kind, chosen, prompts, per_step)
            outside = [row for row in chosen.tolist() if row not in candidates]
            if outside:
                raise ContractError(
                    f"curriculum {spec.kind!r} chose prompt {outside[0]}, which is none of its candidates"
                )
            check_equal(f"curriculum {spec.kind!r}", chosen, other.choose(known, per_step, decision_rng()))


def _known(spec: CurriculumSpec, step: int, prompts: int) -> Signals:
    """Nothing at first, then ever more of the list."""
    values = np.linspace(0.0, 1.0, prompts)
    values[np.arange(prompts) >= prompts * (step - 1) // (_STEPS - 1)] = np.nan
    signals = {name: Signal("prompt", values) for name in spec.reads}
    return Signals(step, prompts, np.linspace(1.0, 0.0, 5), signals)
