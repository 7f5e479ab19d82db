"""Commands on parts: list and describe them, serve a reward."""

from __future__ import annotations

import inspect
import json
from typing import Annotated

import typer

from aegpo.commands.options import Plain, Plugins


def plugins(
    part: Annotated[str, typer.Argument(metavar="[KIND/NAME]", help="one part, e.g. allocators/entropy")] = "",
    plain: Plain = False,
    plugin: Plugins = [],  # noqa: B006
) -> None:
    """List every registered part and who ships it, or show the fields of one."""
    from aegpo.commands import describe
    from aegpo.core.sheets import print_sheet
    from aegpo.core.terminals import console, say
    from aegpo.plugin.manager import load_registries, plugin_manager

    registries = load_registries(plugin_manager(plugin))
    to = console()
    if not part:
        print_sheet(describe.parts(registries), to)
        return
    entry, fields = describe.part(registries, part)
    paragraphs = inspect.cleandoc(entry.spec.__doc__ or "").split("\n\n")
    say(to, f"{part}, shipped by {entry.source}", style="bold")
    for paragraph in paragraphs:
        flowing = not any(line.startswith((" ", "*", "-")) for line in paragraph.splitlines())
        say(to, "\n" + (" ".join(paragraph.split()) if flowing else paragraph))
    to.print()
    print_sheet(fields, to)


def schema(plugin: Plugins = []) -> None:  # noqa: B006
    """Print the JSON schema of experiment files."""
    from aegpo.config.schema import file_schema
    from aegpo.plugin.manager import load_registries, plugin_manager

    print(json.dumps(file_schema(load_registries(plugin_manager(plugin))), indent=2))


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
