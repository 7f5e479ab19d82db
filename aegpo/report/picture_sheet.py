"""A sheet of labelled pictures: for each prompt its text, and below it one picture a column."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from aegpo.runs.filmstrips import SEAM, shown_frames

if TYPE_CHECKING:
    from torch import Tensor

SMALLEST, LARGEST = 160, 384  # pixels of a picture on the sheet
MARGIN, GAP, LINE, FONT = 16, 8, 18, 14
PAPER, INK, SOFT = "#ffffff", "#24292e", "#5b646d"
LINES = 3  # of a prompt
DENSE = 6  # prompts below one another; more begin another column
FRAMES_PER_SECOND = 8  # of animated PNGs; a model does not say how fast its videos go


Picture = tuple[Image.Image, ...]  # the frames of a video, or an image alone


@dataclass(frozen=True)
class Row:
    """One prompt and its pictures."""

    text: str
    pictures: tuple[Picture, ...]


def pictures(images: Tensor) -> list[Picture]:
    """(B, [F,] 3, h, w) in [0, 1] -> B pictures of 8 bits."""
    pixels = (images.float().clamp(0, 1) * 255).round().byte().movedim(-3, -1).cpu().numpy()
    videos = pixels[:, None] if images.ndim == 4 else pixels
    return [tuple(Image.fromarray(np.ascontiguousarray(frame)) for frame in video) for video in videos]


def strip(picture: Picture) -> Image.Image:
    """An image as it is; of a video some frames side by side."""
    if len(picture) == 1:
        return picture[0]
    frames = [picture[frame] for frame in shown_frames(len(picture))]
    width, height = frames[0].size
    joined = Image.new("RGB", (len(frames) * (width + SEAM) - SEAM, height), PAPER)
    for number, frame in enumerate(frames):
        joined.paste(frame, (number * (width + SEAM), 0))
    return joined


def sheet(rows: Sequence[Row], titles: Sequence[str]) -> Image.Image:
    """The labelled sheet; `titles` head the pictures of every row."""
    font = ImageFont.load_default(FONT)
    shown = [[strip(_fitting(picture)) for picture in row.pictures] for row in rows]
    width, height = shown[0][0].size
    block_width = len(titles) * (width + GAP) - GAP
    texts = [_wrapped(row.text, font, block_width) for row in rows]
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
        for number, picture in enumerate(row):
            x = left + number * (width + GAP)
            if index % deep == 0:
                draw.text((x, MARGIN), titles[number], fill=SOFT, font=font)
            canvas.paste(picture, (x, top + text_height))
        for number, line in enumerate(lines):
            draw.text((left, top + text_height - LINE * (len(lines) - number)), line, fill=INK, font=font)
    return canvas


def save_pictures(images: Sequence[Picture], folder: Path, first: int = 0) -> None:
    """PNGs named by number, from `first`; videos as animated PNGs of all their frames."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, (image, *others) in enumerate(images):
        path = folder / f"{first + index:05d}.png"
        image.save(path, save_all=bool(others), append_images=others, duration=1000 / FRAMES_PER_SECOND)


def _fitting(picture: Picture) -> Picture:
    """Small pictures enlarged by whole factors, pixel by pixel; large ones made smaller, frames of videos more so."""
    longest, most = max(picture[0].size), LARGEST if len(picture) == 1 else SMALLEST
    if longest > most:
        smaller = tuple(frame.copy() for frame in picture)
        for frame in smaller:
            frame.thumbnail((most, most))
        return smaller
    factor = math.ceil(SMALLEST / longest)
    size = (picture[0].width * factor, picture[0].height * factor)
    return tuple(frame.resize(size, Image.Resampling.NEAREST) for frame in picture)


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
