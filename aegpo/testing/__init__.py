"""Testing: conformance checks for plugin authors, one for each kind of part, and what else their tests call.

A check builds the part on the CPU, feeds it many valid inputs and raises `ContractError`, with the part's name, at the
first thing that would break a run: a wrong shape or type, a value that is not finite, a result that changes between
equal calls. torch is imported inside the checks that need it, because a spec must be importable and valid without.

May import every room; no room imports it.
"""

from aegpo.testing.common import check_spec
from aegpo.testing.decisions import check_allocator, check_selector, check_tree
from aegpo.testing.knowing import check_curriculum, check_signal
from aegpo.testing.learning import check_advantage, check_objective, check_sampler
from aegpo.testing.models import adapt, attention_entropies, paint
from aegpo.testing.plugins import check_installed, load_arms
from aegpo.testing.worlds import check_model, check_reward, check_tracker

__all__ = [
    "adapt",
    "attention_entropies",
    "check_advantage",
    "check_allocator",
    "check_curriculum",
    "check_installed",
    "check_model",
    "check_objective",
    "check_reward",
    "check_sampler",
    "check_selector",
    "check_signal",
    "check_spec",
    "check_tracker",
    "check_tree",
    "load_arms",
    "paint",
]
