"""Texts of unequal length in one batch: shorter ones are padded, and a mask says where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from aegpo.core.records import Conditioning


def joined(parts: Sequence[Conditioning]) -> Conditioning:
    """The rows of all parts, in order; there is a mask if any part has one or is shorter than another.

    Every part has the same `extra`.
    """
    longest = max(part.text.shape[1] for part in parts)
    text = torch.cat([F.pad(part.text, (0, 0, 0, longest - part.text.shape[1])) for part in parts])
    pooled = [part.pooled for part in parts if part.pooled is not None]
    whole = all(part.mask is None and part.text.shape[1] == longest for part in parts)
    mask = None if whole else torch.cat([F.pad(_words(part), (0, longest - part.text.shape[1])) for part in parts])
    names = dict.fromkeys(name for part in parts for name in part.extra)
    extra = {name: torch.cat([part.extra[name] for part in parts]) for name in names}
    return Conditioning(text, torch.cat(pooled) if pooled else None, mask, extra)


def unpadded(cond: Conditioning, row: int) -> Conditioning:
    """One row without the padding at its end, so that it does not depend on what it was encoded with."""
    one = cond.select(torch.tensor([row], device=cond.text.device))
    if one.mask is None:
        return one
    length = int(one.mask[0].nonzero().max()) + 1
    mask = one.mask[:, :length].bool()
    return replace(one, text=one.text[:, :length], mask=None if bool(mask.all()) else mask)


def _words(part: Conditioning) -> Tensor:  # (P, L) bool
    if part.mask is not None:
        return part.mask.bool()
    return torch.ones(part.text.shape[:2], dtype=torch.bool, device=part.text.device)
