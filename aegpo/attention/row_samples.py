"""Some rows of an attention in place of all of them: how they are drawn, and how well they stand for the rest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from aegpo.errors import AegpoError

Rows = int | Literal["all"]
Part = Literal["image", "text", "rest"]

PARTS: tuple[Part, ...] = ("image", "text", "rest")


def token_parts(image: slice, text: slice, tokens: int) -> dict[Part, Tensor]:
    """Indices of the image tokens, of the text tokens and of others (registers, padding), where there are any."""
    of_token = torch.full((tokens,), PARTS.index("rest"))
    of_token[image], of_token[text] = PARTS.index("image"), PARTS.index("text")
    found = {part: (of_token == number).nonzero()[:, 0] for number, part in enumerate(PARTS)}
    return {part: index for part, index in found.items() if len(index)}


def sample_rows(image: slice, text: slice, queries: int, rows: Rows, seed: int) -> Tensor:
    """(rows,) sorted indices of query rows, drawn without replacement within image, text and other tokens.

    Each kind of token gets its share of the rows, and at least two where it has them and `rows` allows, because a
    standard error needs two. The same seed draws the same rows, so that comparisons are paired.

    Raises:
        AegpoError: fewer rows than kinds of token.
    """
    return draw_rows(list(token_parts(image, text, queries).values()), rows, seed)


def draw_rows(strata: Sequence[Tensor], rows: Rows, seed: int) -> Tensor:
    """The same for any strata, given as the indices of their rows; all of them if `rows` is not fewer."""
    strata = [stratum for stratum in strata if len(stratum)]
    sizes = [len(stratum) for stratum in strata]
    if rows == "all" or rows >= sum(sizes):
        return torch.cat([*strata, torch.zeros(0, dtype=torch.long)]).sort().values
    generator = torch.Generator().manual_seed(seed)
    drawn = [
        stratum[torch.randperm(len(stratum), generator=generator)[:count]]
        for stratum, count in zip(strata, _shares(sizes, rows), strict=True)
    ]
    return torch.cat(drawn).sort().values


def _shares(sizes: Sequence[int], rows: int) -> list[int]:
    """Proportional to size (largest remainder), with at least two, or one if there are too few, of each."""
    if rows < len(sizes):
        raise AegpoError(
            f"rows: {rows} cannot stand for {len(sizes)} kinds of token (image, text, other); give at least "
            f"{len(sizes)}"
        )
    least = [min(size, 2 if rows >= 2 * len(sizes) else 1) for size in sizes]
    exact = [rows * size / sum(sizes) for size in sizes]
    shares = [max(low, math.floor(share)) for low, share in zip(least, exact, strict=True)]
    while sum(shares) != rows:
        step = 1 if sum(shares) < rows else -1
        open_to = [n for n, size in enumerate(sizes) if (shares[n] < size if step > 0 else shares[n] > least[n])]
        shares[max(open_to, key=lambda n: step * (exact[n] - shares[n]))] += step
    return shares


def stratified_mean(values: Tensor, stratum: Tensor, sizes: Tensor, drawn_all: bool) -> tuple[Tensor, Tensor]:
    """Mean over a population of which some rows were drawn within strata, and its standard error.

    mean = sum_h W_h mean_h and var = sum_h W_h^2 (1 - n_h / N_h) s_h^2 / n_h with W_h = N_h / N (Cochran, Sampling
    Techniques, 3rd ed., eq. 5.1 and 5.12). A stratum of which one row of several was drawn has no known error: nan.

    Args:
        values: (B, heads, rows).
        stratum: (B or 1, rows) int64, the stratum of each row; -1: not counted.
        sizes: (B or 1, strata) int64, rows of each stratum in the population, N_h.
        drawn_all: every row of the population was drawn, so that there is no error.

    Returns:
        Mean and standard error, (B, heads) float32 each; nan if the population is empty.
    """
    values = values.double()
    mean, variance = values.new_zeros(values.shape[:2]), values.new_zeros(values.shape[:2])
    share = sizes.double() / sizes.sum(dim=-1, keepdim=True)  # (B or 1, strata)
    for number in range(sizes.shape[-1]):
        chosen = (stratum == number)[:, None]  # (B or 1, 1, rows)
        drawn, size, weight = chosen.sum(-1), sizes[:, number, None], share[:, number, None]  # (B or 1, 1) each
        average = torch.where(chosen, values, 0).sum(-1) / drawn  # (B, heads)
        mean = mean + torch.where(weight == 0, 0, weight * average)
        if drawn_all:
            continue
        spread = torch.where(chosen, values - average[..., None], 0).square().sum(-1) / (drawn - 1)
        error = torch.where(drawn == size, 0, (1 - drawn / size) * spread / drawn)
        variance = variance + torch.where(weight == 0, 0, weight**2 * error)
    empty = sizes.sum(dim=-1, keepdim=True) == 0
    return mean.masked_fill(empty, math.nan).float(), variance.sqrt().masked_fill(empty, math.nan).float()
