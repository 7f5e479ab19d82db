"""Commands on experiment files: train them, or see what they would cost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from aegpo.commands.options import (
    MOST,
    MOST_GPUS,
    MOST_SEED,
    Cluster,
    ClusterSet,
    FileArgument,
    Gpus,
    MaxRestarts,
    Nodes,
    Overrides,
    Plain,
    Plugins,
    Processes,
)


def run(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="experiment file (YAML), or a folder whose runs go on", show_default=False),
    ],
    arm: Annotated[list[str], typer.Option("--arm", metavar="ARM", help="run only this arm; may be repeated")] = [],  # noqa: B006
    seed: Annotated[
        list[int],
        typer.Option("--seed", metavar="SEED", min=0, max=MOST_SEED, help="run only this seed; may be repeated"),
    ] = [],  # noqa: B006
    overrides: Overrides = [],  # noqa: B006
    out: Annotated[Path, typer.Option(help="folder of all runs")] = Path("runs"),
    jobs: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MOST,
            help="runs at a time; default: one for each GPU or core, or for as many of them as a run has processes",
        ),
    ] = None,
    processes: Processes = None,
    gpus: Gpus = None,
    max_restarts: MaxRestarts = None,
    cluster: Cluster = None,
    cluster_set: ClusterSet = [],  # noqa: B006
    nodes: Nodes = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="start over instead of going on with what is there")] = False,
    no_report: Annotated[bool, typer.Option("--no-report", help="write no report at the end")] = False,
    plain: Plain = False,
    plugin: Plugins = [],  # noqa: B006
) -> None:
    """Train every arm under every seed, going on where an earlier call stopped, then write one report."""
    from aegpo.commands.init import at_hand
    from aegpo.commands.launch_request import LaunchRequest
    from aegpo.commands.run import launch

    request = LaunchRequest(
        path=at_hand(file),
        overrides=tuple(overrides),
        plugins=tuple(plugin),
        arms=tuple(arm),
        seeds=tuple(seed),
        out=out,
        jobs=jobs,
        processes=processes,
        gpus=gpus,
        max_restarts=max_restarts,
        cluster=cluster,
        cluster_set=tuple(cluster_set),
        nodes=nodes,
        fresh=fresh,
        report=not no_report,
    )
    raise typer.Exit(launch(request))


def check(
    file: FileArgument,
    gpus: Annotated[
        int | None,
        typer.Option(
            min=1, max=MOST_GPUS, help="also how one run of so many GPUs shares out a step, and what each holds"
        ),
    ] = None,
    gpu_memory: Annotated[
        float | None,
        typer.Option(min=0.1, max=1e6, help="GiB of a GPU to estimate for; default: those of the first one here"),
    ] = None,
    overrides: Overrides = [],  # noqa: B006
    out: Annotated[Path, typer.Option(help="folder of all runs, where some of these may be")] = Path("runs"),
    plain: Plain = False,
    rewards: Annotated[
        bool, typer.Option("--rewards", help="also try each reward on images that should score high and low; loads it")
    ] = False,
    plugin: Plugins = [],  # noqa: B006
) -> None:
    """Validate a file, show what differs between its arms and what each costs. Loads no model that is not asked for."""
    from aegpo.commands.check import CheckRequest, check
    from aegpo.commands.init import at_hand
    from aegpo.core.terminals import console

    check(CheckRequest(at_hand(file), tuple(overrides), out, tuple(plugin), gpus, rewards, gpu_memory), console())
