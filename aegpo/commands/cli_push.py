"""The command that publishes what was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from aegpo.commands.options import Checkpoint, LayoutOption, Plugins


def push(
    subject: Annotated[
        Path,
        typer.Argument(
            metavar="RUN_OR_DIR", help="a run, or a folder that `aegpo export --card` wrote", show_default=False
        ),
    ],
    repository: Annotated[
        str, typer.Argument(metavar="REPO_ID", help="NAME or OWNER/NAME; made if need be", show_default=False)
    ],
    private: Annotated[bool, typer.Option("--private", help="for nobody else to see")] = False,
    revision: Annotated[
        str | None, typer.Option(metavar="BRANCH", help="made if need be; default: main", show_default=False)
    ] = None,
    checkpoint: Checkpoint = None,
    full: Annotated[bool, typer.Option("--full", help="of a run: the whole pipeline, as export --full")] = False,
    layout: LayoutOption = "diffusers",
    plugin: Plugins = [],  # noqa: B006
) -> None:
    """Upload a policy and its model card to the Hugging Face hub."""
    from aegpo.commands.export import ExportRequest
    from aegpo.commands.push import PushRequest, push

    exported = ExportRequest(subject, Path(), checkpoint, full, tuple(plugin), layout)
    print(push(PushRequest(exported, repository, private, revision)))
