"""What trackers are told of a step beside its metrics, against hand-computed values."""

from __future__ import annotations

import math

import pytest
import torch
from worlds import GaussianSpec, execution, plan_of

from aegpo.method.trees import IndependentTree
from aegpo.train.engine import _unrecorded
from aegpo.train.findings import Findings
from aegpo.train.tally import Tally


def settled(*batches):
    """The tally of micro-batches of weights and ratios."""
    found = Findings(execution(GaussianSpec().build(torch.device("cpu")), 4), "clipped")
    for weight, ratio in batches:
        ratios = torch.tensor(ratio)
        found.add(torch.tensor(weight), {"loss": torch.zeros_like(ratios), "ratio": ratios})
    found.settle(tally := Tally())
    return tally


def test_the_spread_of_the_ratio_is_that_of_all_edges_by_their_weights():
    plan = plan_of(IndependentTree(), [2, 2], [[1, 1, 1, 0]] * 2)
    learned = settled(([1.0, 3.0], [1.0, 1.5]), ([4.0], [0.75]))
    found = _unrecorded(torch.tensor([0.5, 0.5, 0.25, 0.5]), plan, learned)
    mean = (1 * 1.0 + 3 * 1.5 + 4 * 0.75) / 8
    variance = (1 * 1.0**2 + 3 * 1.5**2 + 4 * 0.75**2) / 8 - mean**2
    assert found["ratio_std"] == pytest.approx(math.sqrt(variance))
    assert found["zero_std_ratio"] == 0.5
    assert dict(learned) == {"loss": 0.0, "ratio": mean}  # what goes into the record is what it was


def test_a_spread_far_below_float32s_own_of_1_is_kept():
    ratios = [1 + 2**-20, 1 - 2**-20]
    plan = plan_of(IndependentTree(), [2, 2], [[1, 1, 1, 0]] * 2)
    found = _unrecorded(torch.tensor([1.0, 1.0, 2.0, 2.0]), plan, settled(([1.0, 1.0], ratios)))
    assert found == {"zero_std_ratio": 1.0, "ratio_std": pytest.approx(2**-20, rel=1e-3)}


def test_where_nothing_was_learned_there_is_no_ratio():
    plan = plan_of(IndependentTree(), [2, 2], [[1, 1, 1, 0]] * 2)
    assert _unrecorded(torch.tensor([1.0, 2.0, 3.0, 4.0]), plan, Tally()) == {"zero_std_ratio": 0.0}
