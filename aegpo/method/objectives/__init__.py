"""Losses of trained transitions, and of clean latents noised again; the engine weighs, sums and normalises them.

A file a family: `clipped` (PPO and the Gaussian KL), `guarded` (GRPO-Guard), `masked` (Flow-DPPO) learn from the
reverse process; `nft` (DiffusionNFT), `matching` (AWM) and `preference` (DGPO, which compares whole groups) from the
forward process. Every one reports `ratio` (how much likelier the policy finds the row than the policy that sampled
did), `clipped` (share of rows that no longer pull, because the policy has moved or the advantage is cut off) and
`approx_kl`.
"""

from aegpo.method.objectives.clipped import ClippedObjective
from aegpo.method.objectives.guarded import GuardedObjective
from aegpo.method.objectives.masked import DivergenceMaskedObjective
from aegpo.method.objectives.matching import MatchingObjective
from aegpo.method.objectives.nft import NftObjective
from aegpo.method.objectives.preference import PreferenceObjective

__all__ = [
    "ClippedObjective",
    "DivergenceMaskedObjective",
    "GuardedObjective",
    "MatchingObjective",
    "NftObjective",
    "PreferenceObjective",
]
