"""From rewards of rollouts to the credit of each trained transition."""

from aegpo.advantages.depth import DepthAdvantage, ProcessAdvantage
from aegpo.advantages.group import GroupAdvantage
from aegpo.advantages.running import RunningAdvantage

__all__ = ["DepthAdvantage", "GroupAdvantage", "ProcessAdvantage", "RunningAdvantage"]
