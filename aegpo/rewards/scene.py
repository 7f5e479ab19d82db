"""Reward `scene`: reads an image of the embedded world back into objects and compares them with the caption.

Pixels and the caption are all it sees. Reading goes in four stages, vectorised over the batch:

1. the background is the palette colour (or white) nearest to most pixels;
2. every pixel is unmixed as (1 - alpha) background + alpha colour, with the colour that leaves the least residual, so
   that the anti-aliased rim of a blue circle on red counts as blue and not as the purple in between;
3. 4-connected components of equal colour with alpha above one half are objects; one too long for a single object is
   cut at higher alpha, which separates neighbours that touch; specks are dropped;
4. each object's alpha is matched against the anti-aliased shapes around its centroid.

The grid of cells that the renderer uses is never assumed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from aegpo.core.parts import RewardSpec
from aegpo.core.records import BoolArray, FloatArray, IntArray
from aegpo.errors import AegpoError
from aegpo.models.shapes.captions import COLOURS, SHAPES, Scene, parse, why_not
from aegpo.models.shapes.rendering import CELL, PALETTE, SIZE, WHITE, coverage

if TYPE_CHECKING:
    from torch import Tensor

Pixels = NDArray[np.float32]

COLOUR_NAMES = (*COLOURS, "white")
COLOUR_VALUES: Pixels = np.array([*(PALETTE[colour] for colour in COLOURS), WHITE], dtype=np.float32)  # (6, 3)
NOTHING = -1  # the colour of a pixel that belongs to no object

SPECK = 6  # pixels; the smallest shape covers 23
LONGEST = 10  # pixels; a shape is at most 8 wide, two neighbours that touch at least 13
CUTS = (0.5, 0.65, 0.8, 0.9)  # alpha above which a pixel belongs to an object; the later ones only where objects touch
WINDOW = CELL + 4  # pixels on a side of the patch that is matched against the shapes
SHIFTS = (-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5)  # pixels; a triangle's centroid lies 1 below the middle of its cell
LEAST_MATCH = 0.9  # Dice below which strict takes an object for no shape at all
MATCH_SCALE = 0.03  # Dice by which a wrong shape falls to 1/e of the credit; circle and square differ by 0.06

# Weights of the parts of the dense score, our choice. Before the floor is subtracted the caption of another image earns
# 0.27 on average (standard deviation 0.19), after it 0.08; a higher floor would hide progress of poor images.
WEIGHTS = {"background": 1.0, "colour": 1.0, "count": 2.0, "shape": 2.0, "relation": 2.0, "nothing-extra": 1.5}
FLOOR = 0.33


@dataclass(frozen=True)
class Found:
    """One object read from an image."""

    colour: str
    centre: tuple[float, float]  # (x, y) pixels, y downwards
    match: tuple[float, ...]  # Dice with each of SHAPES, in [0, 1]

    @property
    def shape(self) -> str | None:
        """The shape that matches best, or None if none does."""
        best = max(self.match)
        return SHAPES[self.match.index(best)] if best >= LEAST_MATCH else None

    def credit(self, shape: str) -> float:
        """How much this object counts as `shape`: 1 if it matches best and well, towards 0 as others match better."""
        best = max(self.match)
        relative = np.exp((self.match[SHAPES.index(shape)] - best) / MATCH_SCALE)
        return float(relative) * min(1.0, best / LEAST_MATCH)


@dataclass(frozen=True)
class Reading:
    """What one image shows."""

    background: str  # a palette colour or "white"
    objects: tuple[Found, ...]


class SceneReward(RewardSpec):
    """Reads the image back and scores count, colours, shapes, relation and background, in [0, 1]."""

    kind: Literal["scene"] = "scene"
    particular: ClassVar[bool] = True
    strict: bool = Field(False, description="1 where everything is right and nothing is extra, else 0")

    def refuses(self, prompt: str) -> str | None:
        """Why a prompt is no caption of the embedded world; None: it is one."""
        return why_not(prompt)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """(N, 3, 24, 24) in [0, 1] and N captions -> (N,) float32 in [0, 1], higher is better.

        Raises:
            AegpoError: if the images have another size or a prompt is not a caption of the embedded world.
        """
        import torch

        judge = strict_score if self.strict else dense_score
        readings = read(to_pixels(images, len(prompts)))
        scores = [judge(reading, parse(prompt)) for reading, prompt in zip(readings, prompts, strict=True)]
        return torch.tensor(scores, dtype=torch.float32, device=images.device)


def to_pixels(images: Tensor, count: int) -> Pixels:  # (N, SIZE, SIZE, 3)
    """The images of a batch as an array with channels last.

    Raises:
        AegpoError: if they are not `count` images of the embedded world's size.
    """
    if tuple(images.shape) != (count, 3, SIZE, SIZE):
        raise AegpoError(
            f"images have shape {tuple(images.shape)} for {count} captions; the rewards of the embedded world read "
            f"({count}, 3, {SIZE}, {SIZE})"
        )
    pixels: Pixels = images.detach().float().cpu().numpy().transpose(0, 2, 3, 1)
    return pixels


# --- judging ---------------------------------------------------------------------------------------------------------


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


# --- reading ---------------------------------------------------------------------------------------------------------


def read(pixels: Pixels) -> list[Reading]:
    """What each image of a batch (N, SIZE, SIZE, 3) shows."""
    background = _backgrounds(pixels)
    colour, alpha = _unmix(pixels, background)
    label, count = _objects(colour, np.take_along_axis(alpha, np.maximum(colour, 0)[..., None], axis=3)[..., 0])
    image, row, column = np.nonzero(label)
    member = label[image, row, column] - 1  # (pixels of objects,) in [0, count)
    first = np.zeros(count, dtype=np.int64)
    first[member[::-1]] = np.arange(len(member))[::-1]
    owner, hue = image[first], colour[image, row, column][first]
    area = np.bincount(member, minlength=count)
    x = np.bincount(member, column + 0.5, minlength=count) / np.maximum(area, 1)
    y = np.bincount(member, row + 0.5, minlength=count) / np.maximum(area, 1)
    match = _match_shapes(label, alpha, owner, hue, x, y)
    found: list[list[Found]] = [[] for _ in pixels]
    for index in range(count):
        centre = (float(x[index]), float(y[index]))
        found[owner[index]].append(Found(COLOUR_NAMES[hue[index]], centre, tuple(match[index].tolist())))
    return [Reading(COLOUR_NAMES[which], tuple(objects)) for which, objects in zip(background, found, strict=True)]


def _backgrounds(pixels: Pixels) -> IntArray:  # (N,)
    """The colour nearest to most pixels of each image: objects cover at most four ninths."""
    distance = -2 * pixels.reshape(len(pixels), -1, 3) @ COLOUR_VALUES.T + (COLOUR_VALUES**2).sum(axis=1)
    nearest = distance.argmin(axis=2)  # (N, SIZE * SIZE); |pixel|^2 is the same for every colour
    votes = (nearest[..., None] == np.arange(len(COLOUR_VALUES))).sum(axis=1)
    winners: IntArray = votes.argmax(axis=1)
    return winners


def _unmix(pixels: Pixels, background: IntArray) -> tuple[IntArray, Pixels]:
    """The colour over the background at each pixel (N, SIZE, SIZE) and the alpha of each colour (N, SIZE, SIZE, 6)."""
    base = COLOUR_VALUES[background][:, None]  # (N, 1, 3)
    offset = pixels.reshape(len(pixels), -1, 3) - base  # (N, SIZE * SIZE, 3)
    towards = COLOUR_VALUES[None] - base  # (N, 6, 3)
    length = np.maximum((towards**2).sum(axis=2), 1e-12)[:, None]  # (N, 1, 6)
    along = offset @ towards.transpose(0, 2, 1)  # (N, SIZE * SIZE, 6)
    alpha = np.clip(along / length, 0.0, 1.0)
    residual = alpha * (alpha * length - 2 * along)  # and |offset|^2, the same for every colour
    residual[np.arange(len(pixels)), :, background] = np.inf
    colour = residual.argmin(axis=2)
    shape = pixels.shape[:3]
    return colour.reshape(shape), alpha.reshape(*shape, len(COLOUR_VALUES)).astype(np.float32)


def _objects(colour: IntArray, alpha: Pixels) -> tuple[IntArray, int]:
    """Labels of objects (N, SIZE, SIZE), 0 outside and 1.. inside, and how many there are."""
    colour = np.where(alpha > CUTS[0], colour, NOTHING)
    label, count = components(colour)
    for cut in CUTS[1:]:
        merged = _longest_side(label, count) > LONGEST
        if not merged.any():
            break
        colour[np.concatenate([[False], merged])[label] & (alpha <= cut)] = NOTHING
        label, count = components(colour)
    kept = np.bincount(label.ravel(), minlength=count + 1) >= SPECK
    kept[0] = False
    renumbered = np.where(kept, np.cumsum(kept), 0)
    return renumbered[label], int(kept.sum())


def _longest_side(label: IntArray, count: int) -> IntArray:  # (count,) pixels
    """The longer side of each component's bounding box."""
    _, row, column = np.nonzero(label)
    member = label[label > 0] - 1
    sides = []
    for place in (row, column):
        low, high = np.full(count, SIZE), np.full(count, -1)
        np.minimum.at(low, member, place)
        np.maximum.at(high, member, place)
        sides.append(high - low + 1)
    longest: IntArray = np.maximum(*sides)
    return longest


def components(colour: IntArray) -> tuple[IntArray, int]:
    """4-connected components of equal colour in each image of a batch.

    Runs of equal pixels within a row are joined through vertical neighbours by union-find with the smallest run as
    the root; there are some 40 runs an image, so this costs microseconds.

    Args:
        colour: (N, rows, columns), `NOTHING` outside of objects.

    Returns:
        (N, rows, columns) labels, 0 outside and 1.. inside, and the number of components.
    """
    inside = colour != NOTHING
    start = inside.copy()
    start[:, :, 1:] &= colour[:, :, 1:] != colour[:, :, :-1]
    run = np.cumsum(start).reshape(colour.shape) - 1
    touching = inside[:, 1:] & (colour[:, 1:] == colour[:, :-1])
    root = _union(int(start.sum()), run[:, 1:][touching], run[:, :-1][touching])
    names, number = np.unique(root, return_inverse=True)
    label = np.zeros(colour.shape, dtype=np.int64)
    label[inside] = number[run[inside]] + 1
    return label, len(names)


def _union(size: int, one: IntArray, other: IntArray) -> IntArray:  # (size,)
    """The smallest element connected to each of `size` elements, given edges between `one` and `other`."""
    root = np.arange(size)
    while True:
        low, high = np.minimum(root[one], root[other]), np.maximum(root[one], root[other])
        if (low == high).all():
            return root
        np.minimum.at(root, high, low)
        while (root[root] != root).any():
            root = root[root]


@cache
def _templates() -> tuple[Pixels, Pixels]:
    """Every shape at every shift in the window, (shapes * shifts^2, WINDOW^2), and the squared norm of each."""
    centred = [np.pad(coverage(shape), (WINDOW - CELL) // 2) for shape in SHAPES]
    moved = [_shift(_shift(mask, down, 0), right, 1).ravel() for mask, down, right in product(centred, SHIFTS, SHIFTS)]
    templates: Pixels = np.stack(moved).astype(np.float32)
    return templates, (templates**2).sum(axis=1)


def _shift(patch: Pixels, distance: float, axis: int) -> Pixels:
    """Moves a patch by a multiple of half a pixel with linear interpolation; its rim is empty."""
    whole = int(np.floor(distance))
    part = distance - whole
    moved: Pixels = (1 - part) * np.roll(patch, whole, axis) + part * np.roll(patch, whole + 1, axis)
    return moved


def _match_shapes(
    label: IntArray, alpha: Pixels, owner: IntArray, hue: IntArray, x: FloatArray, y: FloatArray
) -> Pixels:  # (objects, shapes)
    """Dice coefficient of each object's alpha with each shape, at the best shift around the object's centroid."""
    top, left = (np.rint(place - WINDOW / 2).astype(np.int64) for place in (y, x))
    rows = (top[:, None] + np.arange(WINDOW))[:, :, None]  # (objects, WINDOW, 1)
    columns = (left[:, None] + np.arange(WINDOW))[:, None, :]
    outside = (rows < 0) | (rows >= SIZE) | (columns < 0) | (columns >= SIZE)
    place = (owner[:, None, None], rows.clip(0, SIZE - 1), columns.clip(0, SIZE - 1))
    mine = (label[place] == np.arange(1, len(owner) + 1)[:, None, None]) & ~outside
    patch = np.where(_grow(mine) & ~outside, alpha[(*place, hue[:, None, None])], 0).reshape(len(owner), WINDOW**2)
    templates, norm = _templates()
    dice = 2 * patch @ templates.T / ((patch**2).sum(axis=1, keepdims=True) + norm)
    best: Pixels = dice.reshape(len(owner), len(SHAPES), len(SHIFTS) ** 2).max(axis=2)
    return best


def _grow(mask: BoolArray) -> BoolArray:
    """The mask (objects, WINDOW, WINDOW) and its 8 neighbours: brings back the rim below the cut."""
    wide = np.pad(mask, ((0, 0), (1, 1), (0, 0)))
    tall = wide[:, :-2] | wide[:, 1:-1] | wide[:, 2:]
    wide = np.pad(tall, ((0, 0), (0, 0), (1, 1)))
    grown: BoolArray = wide[:, :, :-2] | wide[:, :, 1:-1] | wide[:, :, 2:]
    return grown
