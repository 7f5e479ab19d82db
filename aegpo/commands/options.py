"""Arguments and options that several commands have, and the longer ones of `evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from aegpo.clusters.settings import Kind
from aegpo.core.terminals import plainly

MOST, MOST_SEED = 1_000_000, 2**63 - 1  # of counts and seeds, as in experiment files
MOST_GPUS = 65536  # of one run, as `parallel.shards` in experiment files
MOST_PROCESSES = 4096  # of one run

FileArgument = Annotated[Path, typer.Argument(metavar="FILE", help="experiment file (YAML)", show_default=False)]
Overrides = Annotated[
    list[str],
    typer.Option("--set", metavar="KEY=VALUE", help="change a key in every arm, e.g. optimizer.learning_rate=1e-4"),
]


def _plainly(context: typer.Context, wanted: bool) -> bool:
    if wanted:
        context.with_resource(plainly())
    return wanted


# It is in force as soon as it is read, and until the command ends: nothing needs to be handed its value.
Plain = Annotated[
    bool,
    typer.Option("--plain", callback=_plainly, is_eager=True, help="no colour, lines or bars; a line for each fact"),
]
Plugins = Annotated[
    list[str], typer.Option("--plugin", metavar="MODULE", help="load a plugin: an importable module or a .py file")
]


RunArgument = Annotated[
    Path,
    typer.Argument(
        metavar="RUN", help="folder of a run, OUT/NAME/ARM/seed-S, or with one run below it", show_default=False
    ),
]
Checkpoint = Annotated[
    int | None,
    typer.Option(metavar="STEP", min=1, max=MOST, help="training step; default: the newest", show_default=False),
]
Steps = Annotated[
    int | None,
    typer.Option(min=2, max=1000, help="denoising steps; default: as the run's evaluation", show_default=False),
]
StartSeed = Annotated[
    int | None,
    typer.Option(min=0, max=MOST_SEED, help="start noise, the same for base and policy; default: the evaluations'"),
]
Rewards = Annotated[
    list[str],
    typer.Option(metavar="REWARD", help="a kind, or a mapping {kind: ...}; may be repeated; default: the run's"),
]
ImagesPerPrompt = Annotated[
    int | None,
    typer.Option(min=1, max=1000, help="each from a noise of its own; default: as evaluation", show_default=False),
]
By = Annotated[
    str | None,
    typer.Option(
        metavar="KEY",
        help="a row for each value of this key of the prompts' metadata, and one for all, e.g. kind",
        show_default=False,
    ),
]
Layout = Literal["diffusers", "comfyui", "both"]
LayoutOption = Annotated[Layout, typer.Option(help="of a LoRA: for diffusers, for ComfyUI, or a file for each")]
Rows = Annotated[int | None, typer.Option(min=1, max=MOST, help="query rows measured in each call; default: all")]
Processes = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=1,
        max=MOST_PROCESSES,
        help="processes that compute each run together, sharing its cores or its GPU",
        show_default=False,
    ),
]
Gpus = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=1,
        max=MOST_PROCESSES,
        help="as --processes N, each with a GPU of its own: of G GPUs, G / N runs at a time have N each",
        show_default=False,
    ),
]
MaxRestarts = Annotated[
    int | None,
    typer.Option(
        metavar="K",
        min=0,
        max=MOST,
        help="with --processes or --gpus: how often a run one of whose processes was killed starts again from its "
        "newest checkpoint; default: 3",
        show_default=False,
    ),
]
Cluster = Annotated[
    Kind | None,
    typer.Option(help="make each run a job: of Slurm, of Ray, or of this machine's own queue", show_default=False),
]
ClusterSet = Annotated[
    list[str],
    typer.Option(metavar="KEY=VALUE", help="with --cluster: a setting of jobs, e.g. partition=gpu; may be repeated"),
]
Nodes = Annotated[
    int | None,
    typer.Option(
        metavar="M",
        min=1,
        max=MOST_PROCESSES,
        help="with --cluster slurm: machines of each run, each with as many processes as --gpus or --processes says",
        show_default=False,
    ),
]
