"""Conformance checks for plugin authors: call the one for your kind of part in a test.

Each builds the part on the CPU, feeds it many valid inputs and raises `ContractError`, with the part's name, at the
first thing that would break a run: a wrong shape or type, a value that is not finite, a result that changes between
equal calls. torch is imported inside the checks that need it, because a spec must be importable and valid without.
"""

from aegpo.testing.common import check_spec
from aegpo.testing.decisions import check_allocator, check_selector, check_tree
from aegpo.testing.learning import check_advantage, check_objective, check_sampler
from aegpo.testing.worlds import check_model, check_reward, check_tracker

__all__ = [
    "check_advantage",
    "check_allocator",
    "check_model",
    "check_objective",
    "check_reward",
    "check_sampler",
    "check_selector",
    "check_spec",
    "check_tracker",
    "check_tree",
]
