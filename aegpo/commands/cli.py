"""The command line; thin. Nothing here imports torch: `run` does, once the file is known to be right."""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from aegpo import __version__
from aegpo.commands.options import (
    MOST,
    MOST_GPUS,
    MOST_SEED,
    By,
    Checkpoint,
    FileArgument,
    Gpus,
    ImagesPerPrompt,
    MaxRestarts,
    Overrides,
    Plugins,
    Processes,
    Rewards,
    Rows,
    RunArgument,
    StartSeed,
    Steps,
)
from aegpo.commands.streams import lenient
from aegpo.commands.telling import telling

if TYPE_CHECKING:
    from rich.console import Console

WIDE = 160  # columns of tables where the output is no terminal
app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Entry point: runs a command; a mistake of the user or of a plugin is a message and exit code 2."""
    code: int | str | None = None
    with lenient() as lost:
        try:
            with telling():
                app()
        except SystemExit as end:
            code = end.code
    if lost and code in (0, None):
        print(f"error: standard output takes no more: {lost[0].strerror}; what was to be done is done", file=sys.stderr)
        code = 2
    sys.exit(code)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"aegpo {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="show the version")
    ] = False,
) -> None:
    """Reward fine-tuning of text-to-image models, guided by attention entropy."""


@app.command()
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
    fresh: Annotated[bool, typer.Option("--fresh", help="start over instead of going on with what is there")] = False,
    no_report: Annotated[bool, typer.Option("--no-report", help="write no report at the end")] = False,
    plugin: Plugins = [],  # noqa: B006
) -> None:
    """Train every arm under every seed, going on where an earlier call stopped, then write one report."""
    from aegpo.commands.launch_request import LaunchRequest
    from aegpo.commands.run import launch

    request = LaunchRequest(
        path=file,
        overrides=tuple(overrides),
        plugins=tuple(plugin),
        arms=tuple(arm),
        seeds=tuple(seed),
        out=out,
        jobs=jobs,
        processes=processes,
        gpus=gpus,
        max_restarts=max_restarts,
        fresh=fresh,
        report=not no_report,
    )
    raise typer.Exit(launch(request))


@app.command()
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


@app.command()
def export(
    run: RunArgument,
    to: Annotated[Path, typer.Option(metavar="DIR", help="folder that is made", show_default=False)],
    checkpoint: Checkpoint = None,
    full: Annotated[bool, typer.Option("--full", help="the whole pipeline, with a trained LoRA merged in")] = False,
    plugin: Plugins = [],  # noqa: B006
) -> None:
    """Write a run's policy for others: the LoRA that was trained, or the whole pipeline."""
    from aegpo.commands.export import ExportRequest, export

    print(f"to load it:  {export(ExportRequest(run, to, checkpoint, full, tuple(plugin)))}")


@app.command()
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
    plugin: Plugins = [],  # noqa: B006
) -> None:
    """Score a run's policy beside its base, or a model alone, by rewards and prompts of your choice."""
    from aegpo.commands.evaluate import evaluate
    from aegpo.commands.evaluate_request import EvaluateRequest
    from aegpo.report.evaluated import meaning, tables
    from aegpo.report.terminal import print_table

    options = (images_per_prompt, by, checkpoint, seed, steps, out, tuple(plugin), tuple(overrides))
    made, found = evaluate(EvaluateRequest(subject, tuple(rewards), prompts, *options))
    console = _console()
    for table in tables(found):
        print_table(table, console)
    print(f"{meaning(found)}\n{made / 'index.html'}")


@app.command()
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
    plugin: Plugins = [],  # noqa: B006
) -> None:
    """Validate a file, show what differs between its arms and what each costs. Loads no model."""
    from aegpo.commands.check import CheckRequest, check

    check(CheckRequest(file, tuple(overrides), out, tuple(plugin), gpus, gpu_memory), _console())


@app.command("profile-entropy")
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
    plugin: Plugins = [],  # noqa: B006
) -> None:
    """Profile attention entropy: of a run against its base, or of an experiment's base alone."""
    from rich.console import Console

    from aegpo.commands.profile_entropy import ProfileRequest, profile

    request = ProfileRequest(
        path=path,
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
    profile(request, _console(), Console(stderr=True))


@app.command()
def plugins(
    part: Annotated[str, typer.Argument(metavar="[KIND/NAME]", help="one part, e.g. allocators/entropy")] = "",
    plugin: Plugins = [],  # noqa: B006
) -> None:
    """List every registered part and who ships it, or show the fields of one."""
    from rich.markup import escape

    from aegpo.commands import describe
    from aegpo.plugin.manager import load_registries, plugin_manager

    registries = load_registries(plugin_manager(plugin))
    console = _console()
    if not part:
        console.print(describe.parts(registries))
        return
    entry, fields = describe.part(registries, part)
    doc = inspect.cleandoc(entry.spec.__doc__ or "")
    console.print(f"[bold]{escape(part)}[/bold], shipped by {escape(entry.source)}\n\n{escape(doc)}\n")
    console.print(fields)


@app.command()
def schema(plugin: Plugins = []) -> None:  # noqa: B006
    """Print the JSON schema of experiment files."""
    from aegpo.config.schema import file_schema
    from aegpo.plugin.manager import load_registries, plugin_manager

    print(json.dumps(file_schema(load_registries(plugin_manager(plugin))), indent=2))


@app.command("serve-reward")
def serve_reward(
    kind: Annotated[str, typer.Argument(metavar="KIND", help="a reward, e.g. hpsv2", show_default=False)],
    settings: Annotated[
        list[str], typer.Option("--set", metavar="FIELD=VALUE", help="set a field of the reward, e.g. version=v2.0")
    ] = [],  # noqa: B006
    host: Annotated[str, typer.Option(help="address to listen at")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free")] = 8000,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")] = "auto",
    token_env: Annotated[str | None, typer.Option(metavar="NAME", help="environment variable with a token")] = None,
    max_bytes: Annotated[int, typer.Option(min=1, max=2**40, help="largest request that is read")] = 256 * 2**20,
    plugin: Plugins = [],  # noqa: B006
) -> None:
    """Serve a reward over HTTP, for runs that name it as 'remote'."""
    from aegpo.commands.serve_reward import ServeRequest, serve
    from aegpo.plugin.manager import load_registries, plugin_manager

    rewards = load_registries(plugin_manager(plugin)).rewards
    serve(ServeRequest(kind, tuple(settings), host, port, device, token_env, max_bytes), rewards)


def _console() -> Console:
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=WIDE)
