"""How much noise the run's sampler adds at each denoising step: known before a run, and free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

from aegpo.core.experiment import Experiment
from aegpo.core.interfaces import Policy
from aegpo.core.parts import SignalSpec
from aegpo.core.records import FloatArray, Per, Prompt, Signal
from aegpo.core.signals import Measurement

STEP_NOISE = "step-noise"


class StepNoiseSignal(SignalSpec):
    """The std of the sampler's stochastic step at each noise level, the same for every prompt."""

    kind: Literal["step-noise"] = "step-noise"
    provides: ClassVar[Mapping[str, Per]] = {STEP_NOISE: "step"}

    def foreseen(self, experiment: Experiment) -> Mapping[str, Signal]:
        """What it is: it depends on nothing that a run could change."""
        return {STEP_NOISE: Signal("step", experiment.step_table.std)}

    def build(self, experiment: Experiment) -> StepNoise:
        """The stds of the experiment's noise levels."""
        return StepNoise(experiment.step_table.std)


class StepNoise:
    """Stds (T,) that never change."""

    def __init__(self, stds: FloatArray) -> None:
        self._stds = stds

    def measure(self, step: int, prompts: Sequence[Prompt], policy: Policy) -> Measurement:
        """`step-noise` (T,), in units of the latents."""
        return Measurement({STEP_NOISE: self._stds})
