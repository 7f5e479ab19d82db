"""A sheet of labelled pictures: for each prompt its text, and below it one picture a column."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from torch import Tensor

SMALLEST, LARGEST = 160, 384  # pixels of a picture on the sheet
MARGIN, GAP, LINE, FONT = 16, 8, 18, 14
PAPER, INK, SOFT = "#ffffff", "#24292e", "#5b646d"
LINES = 3  # of a prompt
DENSE = 6  # prompts below one another; more begin another column


@dataclass(frozen=True)
class Row:
    """One prompt and its pictures."""

    text: str
    pictures: tuple[Image.Image, ...]


def pictures(images: Tensor) -> list[Image.Image]:
    """(B, 3, h, w) in [0, 1] -> B pictures of 8 bits."""
    pixels = (images.float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(np.ascontiguousarray(each)) for each in pixels]


def sheet(rows: Sequence[Row], titles: Sequence[str]) -> Image.Image:
    """The labelled sheet; `titles` head the pictures of every row."""
    font = ImageFont.load_default(FONT)
    shown = [Row(row.text, tuple(_fitting(picture) for picture in row.pictures)) for row in rows]
    width, height = shown[0].pictures[0].size
    block_width = len(titles) * (width + GAP) - GAP
    texts = [_wrapped(row.text, font, block_width) for row in shown]
    text_height = LINE * max(len(lines) for lines in texts)
    block_height = text_height + height + 2 * GAP
    columns = math.ceil(len(shown) / DENSE)
    deep = math.ceil(len(shown) / columns)
    size = (columns * (block_width + MARGIN) + MARGIN, MARGIN + LINE + GAP + deep * block_height + MARGIN - GAP)
    canvas = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(canvas)
    for index, (row, lines) in enumerate(zip(shown, texts, strict=True)):
        left = MARGIN + index // deep * (block_width + MARGIN)
        top = MARGIN + LINE + GAP + index % deep * block_height
        for number, picture in enumerate(row.pictures):
            x = left + number * (width + GAP)
            if index % deep == 0:
                draw.text((x, MARGIN), titles[number], fill=SOFT, font=font)
            canvas.paste(picture, (x, top + text_height))
        for number, line in enumerate(lines):
            draw.text((left, top + text_height - LINE * (len(lines) - number)), line, fill=INK, font=font)
    return canvas


def save_pictures(images: Sequence[Image.Image], folder: Path, first: int = 0) -> None:
    """PNGs named by number, from `first`."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, image in enumerate(images):
        image.save(folder / f"{first + index:05d}.png")


def _fitting(picture: Image.Image) -> Image.Image:
    """Small pictures enlarged by whole factors, pixel by pixel; large ones made smaller."""
    longest = max(picture.size)
    if longest > LARGEST:
        smaller = picture.copy()
        smaller.thumbnail((LARGEST, LARGEST))
        return smaller
    factor = math.ceil(SMALLEST / longest)
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def _wrapped(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> list[str]:
    """At most LINES lines that fit the width; what is cut off ends in an ellipsis."""
    lines: list[str] = []
    words = text.split()
    while words:
        count = len(words)
        while count > 1 and font.getlength(" ".join(words[:count])) > width:
            count -= 1
        line, words = " ".join(words[:count]), words[count:]
        while font.getlength(line) > width:
            line = line[:-1]
        lines.append(line)
    if len(lines) <= LINES:
        return lines or [""]
    last = lines[LINES - 1]
    while last and font.getlength(last + " ...") > width:
        last = last[:-1]
    return [*lines[: LINES - 1], last.rstrip() + " ..."]
