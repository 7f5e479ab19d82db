"""The default clip range fits the latents: as much of the whole log-ratio as published, at any resolution."""

from __future__ import annotations

import pytest
import torch
from worlds import GaussianSpec, small_experiment

from aegpo.core.records import Update
from aegpo.method.objectives import ClippedObjective, GuardedObjective
from aegpo.method.objectives.clipped import fitting_clip
from aegpo.method.samplers import CpsSampler
from aegpo.models.shapes import ShapesSpec


def an_update(shape, log_ratio: float) -> Update:
    """One transition whose ratio is exp(log_ratio), of advantage 1."""
    one, zero = torch.ones(1), torch.zeros((1, *shape))
    log_prob = torch.full((1,), log_ratio)
    first = torch.zeros(1, dtype=torch.int64)
    return Update(log_prob, torch.zeros(1), one, zero, None, zero, one, one, first, 1.0, first)


@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 24, 24), (16, 64, 64)])
def test_null_clips_where_the_whole_log_ratio_reaches_what_is_published(shape):
    dimensions = torch.Size(shape).numel()
    fitting = fitting_clip("gaussian", dimensions)
    assert fitting * dimensions == pytest.approx(1e-4 * 65536)  # Flow-GRPO's, in nats
    for part, inside in ((0.9, 0.0), (1.1, 1.0)):
        ratio = torch.log1p(torch.tensor(part * fitting)).item()
        for objective in (ClippedObjective(), ClippedObjective(clip=min(fitting, 0.99))):
            if objective.clip is None or objective.clip == fitting:
                assert objective.loss(an_update(shape, ratio))[1]["clipped"].item() == inside


def test_the_guarded_ratio_has_its_own_published_range():
    shape = (3, 24, 24)
    fitting = fitting_clip("guarded", 3 * 24 * 24)
    assert fitting * 3 * 24 * 24 == pytest.approx(2e-6 * 65536)
    for part, inside in ((0.9, 0.0), (1.1, 1.0)):
        ratio = torch.log1p(torch.tensor(part * fitting, dtype=torch.float64)).float().item()
        assert GuardedObjective().loss(an_update(shape, ratio))[1]["clipped"].item() == inside


def test_the_default_warns_of_nothing():
    for model in (GaussianSpec(), ShapesSpec()):
        assert list(small_experiment(model, objective=ClippedObjective()).problems()) == []


def test_a_sampler_whose_log_probability_is_no_gaussian_one_has_no_default():
    cps = small_experiment(ShapesSpec(), sampler=CpsSampler())
    (problem,) = (found for found in cps.problems() if not found.warning)
    assert problem.location == ("objective",)
    assert problem.message == (
        "'clip' has no default for sampler 'cps', whose log-probability is no Gaussian one; Flow-GRPO-Fast with CPS "
        "uses 1e-05 at 65536 dimensions, which is 0.0004 at 1728"
    )
    named = cps.model_copy(update={"objective": ClippedObjective(clip=4e-4)})
    assert list(named.problems()) == []
