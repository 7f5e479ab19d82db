"""At which denoising steps trajectories explore and learn."""

from aegpo.selectors.base import CountedSelector, Selector
from aegpo.selectors.entropy import EntropyPeakSelector, LowestEntropySelector
from aegpo.selectors.plain import (
    FirstSelector,
    FixedSelector,
    FractionSelector,
    RandomSelector,
    TopStdSelector,
    UniformSelector,
)
from aegpo.selectors.windows import DepthPrunedSelector, SlidingWindowSelector, WindowSelector

__all__ = [
    "CountedSelector",
    "DepthPrunedSelector",
    "EntropyPeakSelector",
    "FirstSelector",
    "FixedSelector",
    "FractionSelector",
    "LowestEntropySelector",
    "RandomSelector",
    "Selector",
    "SlidingWindowSelector",
    "TopStdSelector",
    "UniformSelector",
    "WindowSelector",
]
