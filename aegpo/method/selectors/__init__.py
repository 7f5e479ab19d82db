"""At which denoising steps trajectories explore and learn."""

from aegpo.method.selectors.entropy import EntropyPeakSelector, LowestEntropySelector
from aegpo.method.selectors.plain import (
    CountedSelector,
    FirstSelector,
    FixedSelector,
    FractionSelector,
    RandomSelector,
    Selector,
    TopStdSelector,
    UniformSelector,
)
from aegpo.method.selectors.windows import DepthPrunedSelector, SlidingWindowSelector, WindowSelector

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
