"""From scores of rollouts to the credit of each trained transition."""

from aegpo.method.advantages.depth import DepthAdvantage, ProcessAdvantage
from aegpo.method.advantages.gain import GainAdvantage
from aegpo.method.advantages.group import GroupAdvantage
from aegpo.method.advantages.running import RunningAdvantage

__all__ = ["DepthAdvantage", "GainAdvantage", "GroupAdvantage", "ProcessAdvantage", "RunningAdvantage"]
