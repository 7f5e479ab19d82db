"""At which denoising steps trajectories explore and learn."""

from aegpo.method.selectors.merged import MergedSelector
from aegpo.method.selectors.peaks import EntropyPeakSelector, LowestEntropySelector, PeaksSelector
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
    "MergedSelector",
    "PeaksSelector",
    "RandomSelector",
    "Selector",
    "SlidingWindowSelector",
    "TopStdSelector",
    "UniformSelector",
    "WindowSelector",
]
