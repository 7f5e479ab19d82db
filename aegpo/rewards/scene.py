"""Reward `scene`: reads an image of the embedded world back into objects and compares them with the caption.

Pixels and the caption are all it sees; how it reads is in `scene_reading`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from aegpo.core.examples import Examples
from aegpo.core.parts import RewardSpec
from aegpo.core.records import Prompt
from aegpo.models.shapes.captions import Scene, parse, why_not
from aegpo.models.shapes.rendering import CELL
from aegpo.rewards.rendered import rendered_examples
from aegpo.rewards.scene_reading import (
    Found,
    Reading,
    read,
    to_pixels,
)

if TYPE_CHECKING:
    from torch import Tensor

# Weights of the parts of the dense score, our choice. Before the floor is subtracted the caption of another image earns
# 0.27 on average (standard deviation 0.19), after it 0.08; a higher floor would hide progress of poor images.
WEIGHTS = {"background": 1.0, "colour": 1.0, "count": 2.0, "shape": 2.0, "relation": 2.0, "nothing-extra": 1.5}
FLOOR = 0.33


class SceneReward(RewardSpec):
    """Reads the image back and scores count, colours, shapes, relation and background, in [0, 1]."""

    kind: Literal["scene"] = "scene"
    particular: ClassVar[bool] = True
    strict: bool = Field(False, description="1 where everything is right and nothing is extra, else 0")

    def refuses(self, prompt: Prompt) -> str | None:
        """Why a prompt is no caption of the embedded world; None: it is one."""
        return why_not(prompt.text)

    def examples(self) -> Examples:
        """A caption's own picture, and one that shares nothing with it."""
        return rendered_examples()

    def identity(self) -> Mapping[str, Any]:
        """Scores depend on nothing but spec, images and prompts."""
        return {}

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """(N, 3, 24, 24) in [0, 1] and N captions -> (N,) float32 in [0, 1], higher is better.

        Raises:
            AegpoError: if the images have another size or a prompt is not a caption of the embedded world.
        """
        import torch

        judge = strict_score if self.strict else dense_score
        readings = read(to_pixels(images, len(prompts)))
        scores = [judge(reading, parse(prompt.text)) for reading, prompt in zip(readings, prompts, strict=True)]
        return torch.tensor(scores, dtype=torch.float32, device=images.device)


def strict_score(reading: Reading, scene: Scene) -> float:
    """1.0 if the image shows exactly what the caption says, else 0.0."""
    asked = Counter({(group.colour, group.shape): group.count for group in scene.groups})
    if reading.background != (scene.background or "white"):
        return 0.0
    if Counter((found.colour, found.shape) for found in reading.objects) != asked:
        return 0.0
    return float(scene.relation is None or _relation(reading, scene) == 1.0)


def dense_score(reading: Reading, scene: Scene) -> float:
    """Partial credit in [0, 1]: the weighted mean of what is right, less the floor that wrong captions earn."""
    parts = {
        "background": float(reading.background == (scene.background or "white")),
        "colour": _mean([float(_of_colour(reading, group.colour) != []) for group in scene.groups]),
        "count": _count(reading, scene),
        "shape": _shape(reading, scene),
        "nothing-extra": _nothing_extra(reading, scene),
    }
    if scene.relation is not None:
        parts["relation"] = _relation(reading, scene)
    total = sum(WEIGHTS[part] for part in parts)
    raw = sum(WEIGHTS[part] * value for part, value in parts.items()) / total
    return max(0.0, (raw - FLOOR) / (1.0 - FLOOR))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _of_colour(reading: Reading, colour: str) -> list[Found]:
    return [found for found in reading.objects if found.colour == colour]


def _count(reading: Reading, scene: Scene) -> float:
    """Smaller over larger number of objects, averaged over the colours asked for."""
    asked: Counter[str] = Counter()
    for group in scene.groups:
        asked[group.colour] += group.count
    seen = {colour: len(_of_colour(reading, colour)) for colour in asked}
    return _mean([min(seen[colour], count) / max(seen[colour], count) for colour, count in asked.items()])


def _shape(reading: Reading, scene: Scene) -> float:
    """Share of each group's objects that are there in its colour and its shape, averaged over the groups."""
    shares = []
    for group in scene.groups:
        credit = sum(found.credit(group.shape) for found in _of_colour(reading, group.colour))
        shares.append(min(1.0, credit / group.count))
    return _mean(shares)


def _nothing_extra(reading: Reading, scene: Scene) -> float:
    """Objects asked for over those and any in a colour that nobody asked for."""
    asked = sum(group.count for group in scene.groups)
    colours = {group.colour for group in scene.groups}
    return asked / (asked + sum(found.colour not in colours for found in reading.objects))


def _relation(reading: Reading, scene: Scene) -> float:
    """1 if the first object lies half a cell or more to the asked side and no farther across it, falling to 0."""
    chosen = []
    for group in scene.groups:
        members = _of_colour(reading, group.colour)
        if not members:
            return 0.0
        chosen.append(max(members, key=lambda found: found.credit(group.shape)))
    first, second = chosen
    dx, dy = second.centre[0] - first.centre[0], second.centre[1] - first.centre[1]
    along, across = {"left of": (dx, dy), "right of": (-dx, dy), "above": (dy, dx), "below": (-dy, dx)}[
        scene.relation or ""
    ]
    reach = CELL / 2
    far_enough = min(1.0, max(0.0, along / reach))
    straight = min(1.0, max(0.0, 1.0 + (along - abs(across)) / reach))
    return far_enough * straight
