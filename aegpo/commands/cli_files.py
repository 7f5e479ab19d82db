"""Commands that write experiment files."""

from __future__ import annotations

from typing import Annotated

import typer


def init(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[NAME]", help="of the experiment: NAME.yaml is written here", show_default=False),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option("--from", metavar="EXPERIMENT", help="copy one that comes with aegpo, e.g. smoke or ablation"),
    ] = None,
    names: Annotated[bool, typer.Option("--list", help="list those that come with aegpo")] = False,
) -> None:
    """Write a commented experiment file that can be run at once, or a copy of one that comes with aegpo."""
    from aegpo.commands.init import InitRequest, init, listed

    if names:
        print(listed())
        return
    first, *others = init(InitRequest(name, source))
    print(first, *(f"{other} (extended)" for other in others), sep="\n")
    print(f"next:  aegpo check {first}  and  aegpo run {first}")
