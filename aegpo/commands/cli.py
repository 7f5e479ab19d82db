"""The command line; thin. Nothing here imports torch: `run` does, once the file is known to be right."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from aegpo.commands.cli_files import init
from aegpo.commands.cli_parts import plugins, schema, serve_reward
from aegpo.commands.cli_policies import evaluate, export, profile_entropy, sample
from aegpo.commands.cli_push import push
from aegpo.commands.cli_reports import report
from aegpo.commands.cli_runs import check, run
from aegpo.commands.cli_watch import watch
from aegpo.commands.streams import lenient
from aegpo.commands.telling import telling
from aegpo.core.version import __version__

COMMANDS = (
    init,
    run,
    watch,
    report,
    sample,
    export,
    push,
    evaluate,
    check,
    profile_entropy,
    plugins,
    schema,
    serve_reward,
)  # in the order of --help
app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in COMMANDS:
    app.command(short_help=(command.__doc__ or "").partition("\n")[0])(command)  # the whole line, which is never cut


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
