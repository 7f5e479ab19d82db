"""What the embedded model is trained on: pictures that now and then do not show what their caption says."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from repository import ROOT

from aegpo.models.shapes.captions import KINDS, parse, scenes
from aegpo.models.shapes.rendering import render

sys.path.insert(0, str(ROOT / "tools"))

from wrong_captions import Rates, shown

ATTRIBUTES = {
    "colour": lambda scene: [group.colour for group in scene.groups],
    "shape": lambda scene: [group.shape for group in scene.groups],
    "count": lambda scene: [group.count for group in scene.groups],
    "relation": lambda scene: scene.relation,
    "background": lambda scene: scene.background,
}


def pairs(rates: Rates, kinds=KINDS, times=400):
    rng = np.random.default_rng(0)
    for kind in kinds:
        pool = scenes("train")[kind]
        for _ in range(times):
            asked = pool[int(rng.integers(len(pool)))]
            yield asked, shown(asked, rates, rng)


def test_without_rates_a_picture_shows_what_its_caption_says():
    assert all(asked == painted for asked, painted in pairs(Rates()))


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_an_attribute_is_another_one_at_its_rate_and_alone(attribute):
    kinds = {"relation": ("relation",), "count": ("count",)}.get(attribute, ("count", "relation"))
    found = [*pairs(Rates(**{attribute: 0.2}), kinds)]
    changed = np.mean([ATTRIBUTES[attribute](asked) != ATTRIBUTES[attribute](painted) for asked, painted in found])
    groups = np.mean([len(asked.groups) if attribute in ("colour", "shape") else 1 for asked, _ in found])
    assert changed == pytest.approx(1 - 0.8**groups, abs=0.06)
    for name, of in ATTRIBUTES.items():
        assert name == attribute or all(of(asked) == of(painted) for asked, painted in found)


def test_what_is_shown_can_be_painted_and_said_whatever_is_wrong():
    rng = np.random.default_rng(0)
    for asked, painted in pairs(Rates(1, 1, 1, 1, 1)):
        assert asked != painted
        assert painted.background not in {group.colour for group in painted.groups}
        assert parse(painted.caption) == painted
        assert render(painted, rng).max() <= 1


def test_single_objects_stay_single_where_a_relation_holds():
    found = pairs(Rates(count=1), kinds=("relation",))
    assert all(group.count == 1 for _, painted in found for group in painted.groups)
