"""Sources of signals: what allocators, selectors and curricula decide by.

A file a source: `entropy` (attention entropy of the policy, and how far it moved from the base's; `entropy_probe`
measures it and `base_entropies` keeps what never changes), `rewards` (what prompts brought so far), `noise` (what the
sampler adds at each step).
"""

from aegpo.method.signals.entropy import EntropySignal
from aegpo.method.signals.noise import StepNoiseSignal
from aegpo.method.signals.rewards import RewardSignal

__all__ = ["EntropySignal", "RewardSignal", "StepNoiseSignal"]
