"""Measures the embedded text-to-image model on held-out captions: rewards and strict accuracy by kind of caption.

    python tools/evaluate_shapes.py --weights runs/shapes/weights --count 400 --grid samples.png --json accuracy.json

Images come from the deterministic sampler (Euler, equal steps) and one seed, so two runs print the same table.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from diffusers import SD3Transformer2DModel
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import CLIPTextModelWithProjection, PreTrainedTokenizerFast

from aegpo.core.interfaces import Reward
from aegpo.models.shapes.captions import KINDS, captions, parse, scenes
from aegpo.models.shapes.rendering import SIZE
from aegpo.prompts.lists import numbered
from aegpo.rewards.palette import PaletteReward
from aegpo.rewards.scene import SceneReward

TOKENS = 14  # as trained: the longest caption and two marks
BATCH = 100
GRID_COLUMNS = 20
SCALE = 3
REWARDS: dict[str, Reward] = {"palette": PaletteReward(), "scene": SceneReward(), "strict": SceneReward(strict=True)}


@dataclass(frozen=True)
class Options:
    """The command line, typed; see `--help`."""

    weights: Path
    steps: int
    guidance: float
    count: int
    split: Literal["train", "evaluation"]
    seed: int
    grid: Path | None
    json: Path | None


class Sampler:
    """The network of a weights folder and its deterministic sampler."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
        self.text_encoder = CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder").float().eval()
        self.transformer = SD3Transformer2DModel.from_pretrained(folder / "transformer").float().eval()

    def encode(self, texts: list[str]) -> tuple[Tensor, Tensor]:  # (B, TOKENS, D), (B, D')
        tokens = self.tokenizer(texts, padding="max_length", max_length=TOKENS, return_tensors="pt")["input_ids"]
        text = self.text_encoder(input_ids=tokens)
        return text.last_hidden_state, text.text_embeds

    @torch.no_grad()
    def sample(self, texts: list[str], latents: Tensor, steps: int, guidance: float) -> Tensor:
        """Euler from noise (B, 3, SIZE, SIZE) at sigma 1 to images in [0, 1]; guidance 1 is none."""
        asked, nothing = self.encode(texts), self.encode([""] * len(texts))
        sigmas = torch.linspace(1, 0, steps + 1)
        for sigma, following in pairwise(sigmas):
            time = (sigma * 1000).expand(len(texts))
            velocity = self.transformer(latents, *asked, time, return_dict=False)[0]
            if guidance != 1.0:
                plain = self.transformer(latents, *nothing, time, return_dict=False)[0]
                velocity = plain + guidance * (velocity - plain)
            latents = latents + (following - sigma) * velocity
        return ((latents + 1) / 2).clamp(0, 1)


def draw(options: Options) -> list[str]:
    """Captions of the split, the kinds in turn; another seed is begun whenever a kind's captions are used up."""
    most = len(KINDS) * min(len(members) for members in scenes(options.split).values())
    drawn: list[str] = []
    for round_ in range(-(-options.count // most)):
        drawn += captions(options.split, min(most, options.count - len(drawn)), options.seed + round_)
    return drawn


def generate(texts: list[str], options: Options) -> Tensor:  # (count, 3, SIZE, SIZE) in [0, 1]
    sampler = Sampler(options.weights)
    generator = torch.Generator().manual_seed(options.seed)
    noise = torch.randn(len(texts), 3, SIZE, SIZE, generator=generator)
    starts = range(0, len(texts), BATCH)
    images = [
        sampler.sample(texts[i : i + BATCH], noise[i : i + BATCH], options.steps, options.guidance) for i in starts
    ]
    return torch.cat(images)


def summarise(texts: list[str], scores: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """Mean of each reward by kind of caption, and over all of them."""
    kinds = [parse(text).kind for text in texts]
    rows = {name: torch.tensor([name in (kind, "all") for kind in kinds]) for name in (*KINDS, "all")}
    return {
        name: {"n": int(chosen.sum())}
        | {reward: float(score.numpy()[chosen].mean()) for reward, score in scores.items()}
        for name, chosen in rows.items()
        if chosen.any()
    }


def save_grid(images: Tensor, strict: Tensor, path: Path) -> None:
    """Tiles the images in reading order, framed green where everything is right and red where not."""
    frames = np.where(strict.numpy()[:, None] > 0, (0, 190, 0), (230, 0, 0)) / 255.0
    side = SIZE + 4
    rows = -(-len(images) // GRID_COLUMNS)
    canvas = np.ones((rows * side, GRID_COLUMNS * side, 3))
    for index, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
        top, left = (place * side for place in divmod(index, GRID_COLUMNS))
        canvas[top : top + side - 1, left : left + side - 1] = frames[index]
        canvas[top + 1 : top + 1 + SIZE, left + 1 : left + 1 + SIZE] = image
    picture = Image.fromarray((canvas * 255).round().astype(np.uint8))
    picture.resize((picture.width * SCALE, picture.height * SCALE), Image.Resampling.NEAREST).save(path)


def show(summary: dict[str, dict[str, float]], options: Options) -> None:
    """Prints the accuracy table."""
    settings = f"{options.steps} Euler steps, guidance {options.guidance:g}, seed {options.seed}"
    table = Table()
    table.add_column("captions")
    for column in ("n", *REWARDS):
        table.add_column(column, justify="right")
    for name, row in summary.items():
        table.add_row(name, str(row["n"]), *(f"{row[reward]:.3f}" for reward in REWARDS))
    console = Console()
    console.print(f"{options.split} captions, {settings}")
    console.print(table)


def parse_arguments() -> Options:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, help="folder with transformer, text_encoder, tokenizer")
    parser.add_argument("--steps", type=int, default=10, help="Euler steps from noise to image")
    parser.add_argument("--guidance", type=float, default=1.0, help="classifier-free guidance scale; 1 is none")
    parser.add_argument("--count", type=int, default=400, help="captions, one image each")
    parser.add_argument("--split", choices=("train", "evaluation"), default="evaluation")
    parser.add_argument("--seed", type=int, default=0, help="of the captions drawn and of the noise")
    parser.add_argument("--grid", type=Path, help="write the images here as a PNG, green frame: strictly right")
    parser.add_argument("--json", type=Path, help="write the table here as JSON")
    return Options(**vars(parser.parse_args()))


def main() -> None:
    options = parse_arguments()
    texts = draw(options)
    images = generate(texts, options)
    scores = {name: reward.score(images, numbered(texts)) for name, reward in REWARDS.items()}
    summary = summarise(texts, scores)
    show(summary, options)
    if options.grid:
        save_grid(images, scores["strict"], options.grid)
    if options.json:
        settings = {"steps": options.steps, "guidance": options.guidance, "split": options.split, "seed": options.seed}
        options.json.write_text(json.dumps({"settings": settings, "accuracy": summary}, indent=2) + "\n")


if __name__ == "__main__":
    main()
