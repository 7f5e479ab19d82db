"""The command line of `train_shapes.py`."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields
from pathlib import Path

from wrong_captions import Rates


@dataclass(frozen=True)
class Options:
    """The command line, typed; see `--help`."""

    out: Path
    steps: int
    cooldown: int
    batch: int
    processes: int
    average_every: int
    learning_rate: float
    compile: bool
    caption_dropout: float
    rates: Rates
    lesson: int
    noise_shift: float
    ema: float
    save_every: int
    seed: int


def parse_arguments(description: str | None) -> Options:
    """The options of the command line; `description` is the help's."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the state, the curve and the weights")
    parser.add_argument("--steps", type=int, default=20000, help="optimizer steps of the whole run")
    parser.add_argument("--cooldown", type=int, default=6000, help="steps of falling learning rate at the end")
    parser.add_argument("--batch", type=int, default=32, help="images a process and step")
    parser.add_argument("--processes", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--average-every", type=int, default=8, help="steps between parameter averages")
    parser.add_argument("--learning-rate", type=float, default=1.5e-3, help="AdamW's, on the plateau")
    parser.add_argument("--compile", action="store_true", help="compile the network; pays after some minutes")
    parser.add_argument("--caption-dropout", type=float, default=0.1, help="share of captions left empty for guidance")
    parser.add_argument(
        "--wrong",
        nargs="*",
        type=rate,
        default=[],
        metavar="ATTRIBUTE=RATE",
        help="how often a picture has another colour, shape, count, relation or background than its caption says",
    )
    parser.add_argument("--lesson", type=int, default=0, help="steps until another relation is shown; 0: all at once")
    parser.add_argument("--noise-shift", type=float, default=0.0, help="mean of the normal whose sigmoid is sigma")
    parser.add_argument("--ema", type=float, default=0.999, help="decay a step of the averaged weights")
    parser.add_argument("--save-every", type=int, default=1000, help="steps between checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    given = vars(parser.parse_args())
    return Options(rates=Rates(**dict(given.pop("wrong"))), **given)


def rate(text: str) -> tuple[str, float]:
    """`colour=0.1` -> ("colour", 0.1)."""
    name, _, value = text.partition("=")
    if name not in {field.name for field in fields(Rates)} or not 0 <= float(value) <= 1:
        raise ValueError(text)
    return name, float(value)
