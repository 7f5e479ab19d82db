"""Reads images of the embedded world back into objects, in four stages, vectorised over the batch:

1. the background is the palette colour (or white) nearest to most pixels;
2. every pixel is unmixed as (1 - alpha) background + alpha colour, with the colour that leaves the least residual, so
   that the anti-aliased rim of a blue circle on red counts as blue and not as the purple in between;
3. 4-connected components of equal colour with alpha above one half are objects; one too long for a single object is
   cut at higher alpha, which separates neighbours that touch; specks are dropped;
4. each object's alpha is matched against the anti-aliased shapes around its centroid.

The grid of cells that the renderer uses is never assumed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from aegpo.core.records import BoolArray, FloatArray, IntArray
from aegpo.errors import AegpoError
from aegpo.models.shapes.captions import COLOURS, SHAPES
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
