"""Pictures of the embedded world: anti-aliased shapes in a grid of cells, deterministic from a generator."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from aegpo.models.shapes.captions import Scene

CELL = 8
CELLS = 3
SIZE = CELL * CELLS
WHITE = (1.0, 1.0, 1.0)
PALETTE: dict[str, tuple[float, float, float]] = {
    "red": (0.90, 0.12, 0.14),
    "green": (0.13, 0.65, 0.25),
    "blue": (0.12, 0.30, 0.90),
    "yellow": (0.98, 0.84, 0.10),
    "purple": (0.58, 0.18, 0.70),
}
_SUPERSAMPLING = 16


@dataclass(frozen=True)
class Placed:
    """One object in its cell; row and column run from 0 at the top left."""

    row: int
    column: int
    colour: str
    shape: str


@cache
def coverage(shape: str) -> NDArray[np.float32]:  # (CELL, CELL) in [0, 1]
    """How much of each pixel of a cell the shape covers."""
    fine = (np.arange(CELL * _SUPERSAMPLING) + 0.5) / _SUPERSAMPLING - CELL / 2
    y, x = np.meshgrid(fine, fine, indexing="ij")
    inside = {
        "circle": x**2 + y**2 <= 3.3**2,
        "square": np.maximum(np.abs(x), np.abs(y)) <= 3.0,
        "triangle": (y <= 3.0) & (y >= -3.4 + 1.75 * np.abs(x)),
    }[shape]
    blocks = inside.reshape(CELL, _SUPERSAMPLING, CELL, _SUPERSAMPLING)
    mask: NDArray[np.float32] = blocks.mean(axis=(1, 3)).astype(np.float32)
    return mask


def place(scene: Scene, rng: np.random.Generator) -> list[Placed]:
    """Puts the scene's objects into free cells at random, honouring its relation."""
    if scene.relation is not None:
        near, far = sorted(rng.choice(CELLS, size=2, replace=False).tolist())
        line = int(rng.integers(CELLS))
        ends = [near, far] if scene.relation in ("left of", "above") else [far, near]
        across = scene.relation in ("left of", "right of")
        cells = [(line, end) if across else (end, line) for end in ends]
    else:
        total = sum(group.count for group in scene.groups)
        cells = [divmod(int(cell), CELLS) for cell in rng.choice(CELLS**2, size=total, replace=False)]
    objects = [(group.colour, group.shape) for group in scene.groups for _ in range(group.count)]
    return [Placed(row, column, *which) for (row, column), which in zip(cells, objects, strict=True)]


def paint(objects: list[Placed], background: str | None) -> NDArray[np.float32]:  # (SIZE, SIZE, 3) in [0, 1]
    """Draws placed objects over a background colour; None is white."""
    colour = WHITE if background is None else PALETTE[background]
    image = np.tile(np.asarray(colour, dtype=np.float32), (SIZE, SIZE, 1))
    for item in objects:
        window = image[item.row * CELL : (item.row + 1) * CELL, item.column * CELL : (item.column + 1) * CELL]
        alpha = coverage(item.shape)[..., None]
        window *= 1.0 - alpha
        window += alpha * np.asarray(PALETTE[item.colour], dtype=np.float32)
    return image


def render(scene: Scene, rng: np.random.Generator) -> NDArray[np.float32]:  # (SIZE, SIZE, 3) in [0, 1]
    """One picture of the scene with its objects in random cells."""
    return paint(place(scene, rng), scene.background)
