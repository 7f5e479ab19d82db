"""Pictures that do not show what their caption says: what the embedded model is trained on, now and then.

Captions of the web are wrong in the same way, and that is why a model half-knows what it could paint: it learned to
trust words only as far as they deserved it. Each attribute is another one at a rate of its own, colours seldom,
relations often, so that kinds of captions differ in how often they are painted right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from aegpo.models.shapes.captions import COLOURS, COUNTS, RELATIONS, SHAPES, Group, Scene

T = TypeVar("T")


@dataclass(frozen=True)
class Rates:
    """How often each attribute of a caption is wrong, in [0, 1]."""

    colour: float = 0.0
    shape: float = 0.0
    count: float = 0.0
    relation: float = 0.0
    background: float = 0.0


def shown(scene: Scene, rates: Rates, rng: np.random.Generator) -> Scene:
    """The scene that is painted for a caption: each attribute another one, evenly drawn, at its rate.

    Background and groups are of different colours before and after, and two single objects stay single where a
    relation holds between them, so that every scene can be painted.
    """
    background = scene.background
    if rng.random() < rates.background:
        taken = {group.colour for group in scene.groups}
        background = _other(background, [None, *(colour for colour in COLOURS if colour not in taken)], rng)
    relation = scene.relation
    if relation is not None and rng.random() < rates.relation:
        relation = _other(relation, RELATIONS, rng)
    colours = [colour for colour in COLOURS if colour != background]
    groups = tuple(_shown_group(group, colours, relation is None, rates, rng) for group in scene.groups)
    return replace(scene, groups=groups, relation=relation, background=background)


def _shown_group(
    group: Group, colours: Sequence[str], countable: bool, rates: Rates, rng: np.random.Generator
) -> Group:
    colour, shape, count = group.colour, group.shape, group.count
    if rng.random() < rates.colour:
        colour = _other(colour, colours, rng)
    if rng.random() < rates.shape:
        shape = _other(shape, SHAPES, rng)
    if countable and rng.random() < rates.count:
        count = _other(count, range(1, len(COUNTS) + 1), rng)
    return Group(count, colour, shape)


def _other(value: T, values: Sequence[T], rng: np.random.Generator) -> T:
    """One of the values that is not this one."""
    others = [each for each in values if each != value]
    return others[int(rng.integers(len(others)))]
