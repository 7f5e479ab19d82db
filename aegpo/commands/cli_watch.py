"""Commands on runs that go on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def watch(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="folder of an experiment's runs, OUT/NAME", show_default=False)
    ],
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free")] = 8001,
) -> None:
    """Show runs while they go on: a page at this machine that refreshes itself."""
    from aegpo.commands.watch import WatchRequest, watch

    watch(WatchRequest(folder, port))
