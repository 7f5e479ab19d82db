"""The sources of signals that a run measures: built, asked once a step, kept on disk, and told what prompts brought."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from aegpo.core import contracts, untouched
from aegpo.core.experiment import Experiment
from aegpo.core.interfaces import Filed, Rewarded, SignalSource
from aegpo.core.records import IntArray, Per, Prompt, Signal
from aegpo.core.sharing import Sharing, Store
from aegpo.core.signals import Measurement, Signals, Trunk
from aegpo.core.signatures import built
from aegpo.train.policy import Policy


@dataclass(frozen=True)
class Known:
    """What all sources found out about a step's prompts, and what that took."""

    signals: Signals
    forwards: int = 0  # velocity evaluations of single latents
    trunk: Trunk | None = None  # that rollouts may start from


class Sources:
    """The sources of an experiment, by kind: those that provide what a chosen part reads, and no others."""

    def __init__(self, experiment: Experiment, policy: Policy) -> None:
        self._experiment, self._policy = experiment, policy
        self.built: dict[str, SignalSource] = {}
        for kind, spec in experiment.sources.items():
            self.built[kind] = built("signals", kind, partial(spec.build, experiment), SignalSource)
        # Now: later the weights are no longer the base policy's.
        filed = any(isinstance(source, Filed) for source in self.built.values())
        self._identity = policy.identity() if filed else {}

    def measure(self, step: int, prompts: Sequence[Prompt]) -> Known:
        """Signals of a training step's prompts.

        Raises:
            ContractError: if a source fails, or measures what it must not; the message names it.
        """
        signals = Signals(step, len(prompts), self._experiment.sigmas)
        known, forwards, trunk = dict[str, Signal](), 0, None
        for kind, source in self.built.items():
            provides = self._experiment.signals[kind].provides
            with contracts.blaming("signals", kind, once=True):
                with torch.no_grad():
                    found = source.measure(step, prompts, self._policy)
                contracts.check_measurement(kind, provides, found, signals)
            known |= _shown(provides, found)
            forwards, trunk = forwards + found.forwards, trunk or found.trunk
        return Known(Signals(step, len(prompts), self._experiment.sigmas, known), forwards, trunk)

    def known(self, step: int, prompts: Sequence[Prompt], names: Sequence[str]) -> Signals:
        """Signals of the whole list of prompts, for free, before a training step."""
        signals, known = Signals(step, len(prompts), self._experiment.sigmas), dict[str, Signal]()
        for kind, source in self.built.items():
            provides = self._experiment.signals[kind].provides
            if set(names) & provides.keys():
                with contracts.blaming("signals", kind, once=True):
                    with torch.no_grad():
                        found = source.measure(step, prompts, self._policy)
                    contracts.check_measurement(kind, provides, found, signals)
                known |= _shown(provides, found)
        return Signals(step, len(prompts), self._experiment.sigmas, known)

    def rewarded(self, prompts: Sequence[Prompt], rewards: Tensor, group: IntArray) -> None:
        """Tells those that learn from it what a step's prompts brought: (N,) rewards, (N,) rows of `prompts`."""
        for kind, source in self.built.items():
            if isinstance(source, Rewarded):
                with contracts.blaming("signals", kind):
                    source.rewarded(prompts, rewards, group)

    def share(self, store: Store) -> None:
        """Lets those that measure what other runs do ask a store for it."""
        for kind, source in self.built.items():
            if isinstance(source, Sharing):
                with contracts.blaming("signals", kind):
                    source.share(store)

    def open(self, folder: Path, step: int) -> None:
        """Opens the files of those that keep any, as they were after a training step.

        Raises:
            CheckpointError: if a file is damaged or of something else.
        """
        for kind, source in self._filed().items():
            with contracts.blaming("signals", kind):
                source.open(folder / kind, step, self._identity)

    def write(self, step: int) -> None:
        """Puts on disk what was measured up to a training step."""
        for kind, source in self._filed().items():
            with contracts.blaming("signals", kind):
                source.write(step)

    def _filed(self) -> Mapping[str, Filed]:
        return {kind: source for kind, source in self.built.items() if isinstance(source, Filed)}


def _shown(provides: Mapping[str, Per], found: Measurement) -> dict[str, Signal]:
    """What was measured as others see it: they cannot write into what the source may still need."""
    return {name: Signal(provides[name], untouched.read_only(values)) for name, values in found.values.items()}
