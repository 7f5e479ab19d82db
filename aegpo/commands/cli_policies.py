"""Commands on what was trained: paint, export, score, profile."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from aegpo.commands.options import (
    MOST_SEED,
    By,
    Checkpoint,
    ImagesPerPrompt,
    LayoutOption,
    Overrides,
    Plain,
    Plugins,
    Rewards,
    Rows,
    RunArgument,
    StartSeed,
    Steps,
)


def sample(
    run: RunArgument,
    prompt: Annotated[list[str], typer.Option(metavar="TEXT", help="what to paint; may be repeated")] = [],  # noqa: B006
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="more prompts: .txt one a line, .jsonl or .json")
    ] = None,
    checkpoint: Checkpoint = None,
    seed: StartSeed = None,
    steps: Steps = None,
    out: Annotated[
        Path | None, typer.Option(help="folder that is made; default: samples/RUN", show_default=False)
    ] = None,
    plugin: Plugins = [],  # noqa: B006
) -> None:
    """Paint prompts with a run's policy beside its base, from the same noise."""
    from aegpo.commands.sample import SampleRequest, sample

    made = sample(SampleRequest(run, tuple(prompt), prompts, checkpoint, seed, steps, out, tuple(plugin)))
    print(f"{made / 'grid.png'}")


def export(
    run: RunArgument,
    to: Annotated[Path, typer.Option(metavar="DIR", help="folder that is made", show_default=False)],
    checkpoint: Checkpoint = None,
    full: Annotated[bool, typer.Option("--full", help="the whole pipeline, with a trained LoRA merged in")] = False,
    layout: LayoutOption = "diffusers",
    card: Annotated[
        bool, typer.Option("--card", help="a model card too: README.md, from the run's records, for the hub")
    ] = False,
    plugin: Plugins = [],  # noqa: B006
) -> None:
    """Write a run's policy for others: the LoRA that was trained, or the whole pipeline."""
    from aegpo.commands.export import ExportRequest, export

    told = export(ExportRequest(run, to, checkpoint, full, tuple(plugin), layout, card))
    print("to load it:  " + told.replace("\n", "\n             "))


def evaluate(
    subject: Annotated[
        Path,
        typer.Argument(
            metavar="RUN_OR_MODEL",
            help="a run OUT/NAME/ARM/seed-S, all seeds of an arm OUT/NAME/ARM, or an experiment file: its model alone",
            show_default=False,
        ),
    ],
    rewards: Rewards = [],  # noqa: B006
    prompts: Annotated[
        str | None,
        typer.Option(metavar="FILE|hpsv2", help="default: the experiment's held-out prompts", show_default=False),
    ] = None,
    images_per_prompt: ImagesPerPrompt = None,
    by: By = None,
    checkpoint: Checkpoint = None,
    seed: StartSeed = None,
    steps: Steps = None,
    out: Annotated[
        Path | None, typer.Option(help="folder that is made; default: evaluations/RUN", show_default=False)
    ] = None,
    overrides: Overrides = [],  # noqa: B006
    plain: Plain = False,
    plugin: Plugins = [],  # noqa: B006
) -> None:
    """Score a run's policy beside its base, or a model alone, by rewards and prompts of your choice."""
    from aegpo.commands.evaluate import evaluate
    from aegpo.commands.evaluate_request import EvaluateRequest
    from aegpo.commands.init import at_hand
    from aegpo.core.terminals import console, say
    from aegpo.report.evaluated import meaning, tables
    from aegpo.report.terminal import print_table

    options = (images_per_prompt, by, checkpoint, seed, steps, out, tuple(plugin), tuple(overrides))
    made, found = evaluate(EvaluateRequest(at_hand(subject), tuple(rewards), prompts, *options))
    to = console()
    for table in tables(found):
        print_table(table, to)
    say(to, meaning(found))
    print(made / "index.html")


def profile_entropy(
    path: Annotated[
        Path, typer.Argument(metavar="SPEC_OR_RUN", help="experiment file, or folder of a run", show_default=False)
    ],
    prompts: Annotated[Path | None, typer.Option(help="file, one prompt a line; default: the held-out prompts")] = None,
    arm: Annotated[str | None, typer.Option(help="arm; default: the one of a file that reads entropy most")] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, max=MOST_SEED, help="seed; default: the first of the file", show_default=False)
    ] = None,
    checkpoint: Checkpoint = None,
    layers: Annotated[list[str], typer.Option(metavar="PATTERN", help="layers by name, * and ? are wildcards")] = ["*"],  # noqa: B006
    rows: Rows = None,
    out: Annotated[Path | None, typer.Option(help="folder of the profile; default: below profiles/")] = None,
    validate: Annotated[bool, typer.Option("--validate", help="ask whether the signal means anything here")] = False,
    signal: Annotated[
        list[str], typer.Option(metavar="NAME", help="validate another signal beside entropy; repeatable")
    ] = [],  # noqa: B006
    overrides: Overrides = [],  # noqa: B006
    plain: Plain = False,
    plugin: Plugins = [],  # noqa: B006
) -> None:
    """Profile attention entropy: of a run against its base, or of an experiment's base alone."""
    from rich.console import Console

    from aegpo.commands.init import at_hand
    from aegpo.commands.profile_entropy import ProfileRequest, profile
    from aegpo.core.terminals import console

    request = ProfileRequest(
        path=at_hand(path),
        prompts=prompts,
        arm=arm,
        seed=seed,
        checkpoint=checkpoint,
        layers=tuple(layers),
        rows=rows or "all",
        out=out,
        validate=validate,
        signals=tuple(dict.fromkeys(signal)),
        overrides=tuple(overrides),
        plugins=tuple(plugin),
    )
    profile(request, console(), Console(stderr=True))
