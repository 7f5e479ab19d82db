"""The forest of a training step: rollouts side by side, trajectories that branch, children of trunks."""

from aegpo.trees.forest import forest, trunk_levels
from aegpo.trees.splitting import BranchingTree, IndependentTree
from aegpo.trees.trunk import TrunkTree

__all__ = ["BranchingTree", "IndependentTree", "TrunkTree", "forest", "trunk_levels"]
