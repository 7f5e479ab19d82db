"""Reward `palette`: are the asked colours there, in the asked amounts, object by object?

Every pixel is shared out softly over the palette and white, so that the masses of colours vary smoothly with the
pixels. A colour's masses in the cells of the grid, sorted, are compared with those a perfect picture would have: where
an object lies and what shape it has do not matter (beyond the shape's area), but one large blob is not three objects.
Groups of equal colour pool their cells. Shapes and relations are nearly invisible here, and are what `scene` guards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from aegpo.core.examples import Examples
from aegpo.core.parts import RewardSpec
from aegpo.core.records import FloatArray, Prompt
from aegpo.models.shapes.captions import parse, why_not
from aegpo.models.shapes.rendering import CELL, CELLS, coverage
from aegpo.rewards.rendered import rendered_examples
from aegpo.rewards.scene_reading import COLOUR_NAMES, COLOUR_VALUES, Pixels, to_pixels

if TYPE_CHECKING:
    from torch import Tensor

TEMPERATURE = 0.1  # squared RGB distance: a picture that has lost a tenth of its contrast loses a twelfth of the score


class PaletteReward(RewardSpec):
    """How well masses of colours match the caption, object by object: smooth in the pixels, in [0, 1]."""

    kind: Literal["palette"] = "palette"
    particular: ClassVar[bool] = True

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

        With m_ck the sorted cell masses of colour c and t_ck those of a perfect picture, the closeness of a colour is
        sum_k min(m_ck, t_ck) / sum_k max(m_ck, t_ck). The score is the mean closeness, a colour weighing as many times
        as it has objects and the background once, times area / (area + foreign): the area of all objects asked for and
        the mass of colours that nobody asked for. The truth scores 1, the caption of another image 0.08 on average, so
        no floor is subtracted. The formula is ours.

        Raises:
            AegpoError: if the images have another size or a prompt is not a caption of the embedded world.
        """
        import torch

        seen = _cell_masses(to_pixels(images, len(prompts)))
        texts = [prompt.text for prompt in prompts]
        wanted = [*map(_expect, texts)]
        masses = np.stack([expected.masses for expected in wanted])
        weights = np.stack([expected.weights for expected in wanted])  # (N, 6)
        closeness = np.minimum(seen, masses).sum(axis=2) / np.maximum(seen, masses).sum(axis=2)
        mean = (weights * closeness).sum(axis=1) / weights.sum(axis=1)
        excess = np.maximum(seen - masses, 0.0).sum(axis=2)
        foreign = np.where(weights > 0, 0.0, excess).sum(axis=1)
        objects = np.array([expected.objects for expected in wanted])
        scores = mean * objects / (objects + foreign)
        return torch.from_numpy(scores.astype(np.float32)).to(images.device)


@dataclass(frozen=True)
class _Expected:
    """What a perfect picture of a caption has."""

    masses: FloatArray  # (6, CELLS^2) pixels, sorted within each colour
    weights: FloatArray  # (6,) of each colour's closeness; 0 for a colour that is not asked for
    objects: float  # pixels that all objects cover


def _shares(pixels: Pixels) -> FloatArray:  # (..., 3) -> (..., 6), sums to 1
    """How much of each pixel belongs to each colour: a softmax of negative squared distances."""
    logits = (2 * pixels @ COLOUR_VALUES.T - (COLOUR_VALUES**2).sum(axis=1)) / TEMPERATURE
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    shares: FloatArray = (powers / powers.sum(axis=-1, keepdims=True)).astype(np.float64)
    return shares


def _cell_masses(pixels: Pixels) -> FloatArray:  # (N, 6, CELLS^2) pixels
    """The mass of each colour in each cell, sorted within the colour."""
    shares = _shares(pixels).reshape(len(pixels), CELLS, CELL, CELLS, CELL, len(COLOUR_NAMES))
    masses = shares.sum(axis=(2, 4)).reshape(len(pixels), CELLS**2, len(COLOUR_NAMES))
    return np.sort(masses.transpose(0, 2, 1), axis=2)


@cache
def _expect(caption: str) -> _Expected:
    """Masses from the area of each shape; anti-aliased rims are shared out as in an image, so the truth scores 1."""
    scene = parse(caption)
    background = COLOUR_NAMES.index(scene.background or "white")
    cells: list[NDArray[np.float64]] = []  # (6,) each
    weights, objects = np.zeros(len(COLOUR_NAMES)), 0.0
    weights[background] = 1.0
    for group in scene.groups:
        colour = COLOUR_NAMES.index(group.colour)
        alpha = coverage(group.shape)[..., None]
        cell = (1.0 - alpha) * COLOUR_VALUES[background] + alpha * COLOUR_VALUES[colour]
        cells += [_shares(cell).sum(axis=(0, 1))] * group.count
        weights[colour] += group.count
        objects += group.count * float(coverage(group.shape).sum())
    empty = _shares(COLOUR_VALUES[background]) * CELL**2
    cells += [empty] * (CELLS**2 - len(cells))
    return _Expected(np.sort(np.stack(cells).T, axis=1), weights, objects)
