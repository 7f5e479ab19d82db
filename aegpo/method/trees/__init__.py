"""The forest of a training step: rollouts side by side, trajectories that branch, children of trunks."""

from aegpo.method.trees.splitting import BranchingTree, IndependentTree, forest
from aegpo.method.trees.trunk import TrunkTree

__all__ = ["BranchingTree", "IndependentTree", "TrunkTree", "forest"]
