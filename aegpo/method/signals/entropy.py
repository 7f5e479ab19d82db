"""Attention entropy as a signal (AEGPO)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aegpo.core.experiment import Experiment
from aegpo.method.signals.entropy_options import ENTROPY, EntropyOptions

if TYPE_CHECKING:
    from aegpo.method.signals.entropy_probe import EntropyProbe


class EntropySignal(EntropyOptions):
    """Attention entropy of each prompt at each denoising step, and how far it moved from the base policy's (AEGPO).

    `entropy` is in nats, of the current policy along a deterministic trajectory. `entropy-delta` of a prompt is the
    mean over the measured steps of how far it moved from the base policy's at the same noise, as `delta` and `base_on`
    say (AEGPO, Sec. 3; mean: ours).
    The paper leaves open how entropy is measured: the options are our choices.
    """

    def build(self, experiment: Experiment) -> EntropyProbe:
        """The probe, which has measured nothing yet."""
        from aegpo.method.signals.entropy_probe import EntropyProbe

        return EntropyProbe(self)


def entropy_options(experiment: Experiment) -> EntropySignal:
    """How an experiment measures attention entropy, whether a part reads it or not."""
    source = experiment.source(ENTROPY)
    return source if isinstance(source, EntropySignal) else EntropySignal()
