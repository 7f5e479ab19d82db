"""Images of the embedded world by which its rewards are tried: a caption's own picture, and that of another caption."""

from __future__ import annotations

import numpy as np

from aegpo.core.examples import Examples
from aegpo.core.records import FloatArray, Prompt
from aegpo.models.shapes.captions import parse
from aegpo.models.shapes.rendering import render

_ASKED, _OTHER = "two red circles on a green background", "three blue squares on a yellow background"


def rendered_examples() -> Examples:
    """(1, 3, 24, 24) twice: what the caption asks for, and a picture that shares nothing with it."""
    return Examples(Prompt(0, _ASKED), _picture(_ASKED), _picture(_OTHER))


def _picture(caption: str) -> FloatArray:  # (1, 3, 24, 24)
    drawn = render(parse(caption), np.random.default_rng(0))
    return np.ascontiguousarray(drawn.transpose(2, 0, 1)[None], dtype=np.float64)
