"""What each process holds by phase, against arithmetic by hand, and what `weights: auto` chooses."""

from __future__ import annotations

from dataclasses import replace

import pytest

from aegpo.core.footprint import Footprint, Shares
from aegpo.core.phases import (
    USABLE,
    chosen_weights,
    phases,
    replicas_refused,
    share,
    whole_needs,
    whole_weights_from,
)
from aegpo.core.sections import ParallelSpec

# A network of 800 weights in float32, fine-tuned in full, that computes in bfloat16 and has a decoder of 50 bytes.
SHARES = Shares(unshared=50, base=1600, gradients=3200, network=1600, block=300, outside=100, sampling=7)
NEEDS = Footprint(
    parameters=800, trainable=800, weights=3200 + 1600 + 50, optimizer=3 * 3200, activations=11, shares=SHARES
)


def test_whole_weights_are_on_every_process_and_gradients_are_there_only_while_it_learns():
    alone = phases(NEEDS, 1, "whole")
    assert (alone.training, alone.sampling) == (NEEDS.total, NEEDS.weights + 2 * 3200 + 7)
    several = phases(NEEDS, 8, "whole")
    assert several.training == NEEDS.total + 3200  # a flat gradient, to be added up
    assert several.sampling == alone.sampling
    assert phases(NEEDS, 8, "whole", sums=5).training == NEEDS.total + 5


@pytest.mark.parametrize(("processes", "replicas", "shards"), [(8, 1, 8), (16, 2, 8), (16, 1, 16), (2, 2, 1)])
def test_sharded_weights_are_held_in_parts_and_gathered_by_phase(processes, replicas, shards):
    found = phases(NEEDS, processes, "sharded", replicas=replicas)
    assert found.training == 50 + (4800 + 9600) // shards + 11 + 100 + 3 * 300  # in use, next, gradients
    assert found.sampling == 50 + (4800 + 6400) // shards + 7 + 1600
    blockwise = phases(NEEDS, processes, "sharded", replicas=replicas, gather="never")
    assert blockwise.training == found.training
    assert blockwise.sampling == found.sampling - 1600 + 100 + 2 * 300
    assert found.largest == max(found.training, found.sampling)


def test_of_policy_and_base_the_larger_is_gathered_for_they_speak_one_after_the_other():
    small = replace(NEEDS, shares=replace(SHARES, network=3200))
    assert phases(small, 8, "sharded").sampling - phases(NEEDS, 8, "sharded").sampling == 1600
    large = replace(NEEDS, shares=replace(SHARES, base=1700))
    assert phases(large, 8, "sharded").sampling - phases(NEEDS, 8, "sharded").sampling == 100


def test_graphs_of_sampling_are_kept_with_whole_weights_only():
    keeping = replace(NEEDS, retained=1000)
    assert phases(keeping, 8, "whole").training == phases(NEEDS, 8, "whole").training + 1000
    assert phases(keeping, 8, "whole").sampling == phases(NEEDS, 8, "whole").sampling + 1000
    assert phases(keeping, 8, "sharded") == phases(NEEDS, 8, "sharded")


@pytest.mark.parametrize("retained", [0, 400, None])
def test_where_weights_are_shared_activations_are_kept_from_less_memory_on(retained):
    graphs = 60 if retained is None else retained
    deciding = replace(NEEDS, recomputes=True, whole=30, retained=retained)
    deciding = replace(deciding, whole_from=-(-(NEEDS.weights + NEEDS.optimizer + 60 + graphs) * 10 // 8))
    part = share(deciding, 8)
    assert part.whole_from == pytest.approx((part.weights + part.optimizer + 60) / USABLE, abs=2)
    enough, less = part.whole_from, part.whole_from - 1
    assert phases(deciding, 8, "sharded", room=enough).training == phases(NEEDS, 8, "sharded").training + 30 - 11
    assert phases(deciding, 8, "sharded", room=less) == phases(NEEDS, 8, "sharded")


def test_what_a_model_does_not_say_is_not_guessed():
    untold = replace(NEEDS, shares=None)
    assert share(untold, 8) is None
    assert phases(untold, 8, "whole") is None
    assert phases(untold, 8, "sharded") is None


def test_auto_shares_weights_out_where_they_do_not_fit_into_what_is_usable():
    auto, enough = ParallelSpec(), whole_weights_from(NEEDS, 8)
    assert whole_needs(NEEDS, 8) == NEEDS.total + 3200
    assert enough == -(-(NEEDS.total + 3200) * 10 // 8)
    assert chosen_weights(auto, NEEDS, 8, enough) == "whole"
    assert chosen_weights(auto, NEEDS, 8, enough - 1) == "sharded"
    assert chosen_weights(auto, NEEDS, 1, 0) == "whole"
    assert chosen_weights(auto, None, 8, 0) == "whole"
    assert chosen_weights(auto, replace(NEEDS, shares=None), 8, 0) == "whole"


def test_what_is_given_is_taken_but_one_process_has_all_weights_in_any_case():
    for given in ("whole", "sharded"):
        assert chosen_weights(ParallelSpec(weights=given), NEEDS, 8, 10**9) == given
        assert chosen_weights(ParallelSpec(weights=given), None, 8, 0) == given
    assert chosen_weights(ParallelSpec(weights="sharded"), NEEDS, 1, 0) == "whole"


@pytest.mark.parametrize("weights", ["auto", "sharded"])
def test_replicas_divide_the_processes(weights):
    parallel = ParallelSpec(weights=weights, replicas=3)
    assert replicas_refused(parallel, 6) is None
    assert replicas_refused(parallel, 1) is None  # which has all weights
    assert "3 does not divide the 8 processes" in replicas_refused(parallel, 8)
    assert "choose one of 1, 2, 4, 8" in replicas_refused(parallel, 8)
    assert replicas_refused(ParallelSpec(weights="whole", replicas=3), 8) is None
