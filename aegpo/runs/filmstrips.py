"""Videos as pictures: some of their frames side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

SHOWN = 8  # frames of a strip
SEAM = 1  # white pixels between them


def shown_frames(count: int) -> list[int]:
    """At most SHOWN of so many frames, evenly spread, the first and the last among them."""
    return [int(frame) for frame in np.linspace(0, count - 1, min(count, SHOWN)).round()]


def side_by_side(images: Tensor) -> Tensor:
    """Images (N, 3, h, w) in [0, 1] as they are; videos (N, F, 3, h, w) as strips (N, 3, h, w') of shown frames."""
    if images.ndim == 4:
        return images
    import torch.nn.functional as F

    seamed = F.pad(images[:, shown_frames(images.shape[1])], (0, SEAM), value=1.0)
    return seamed.movedim(1, 3).flatten(3)[..., :-SEAM]
