"""How a terminal, or what stands in for one, wants to be written to: how wide, and whether plainly.

Plainly is: no colour, no lines between columns, no bars, one line for each fact. For screen readers, logs and `grep`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

WIDE = 160  # columns where the output is no terminal and COLUMNS does not say how many
PLAIN = "AEGPO_PLAIN"  # the variable that asks for plain output, also of the processes that a command starts
_NO_COLOUR = "NO_COLOR"  # https://no-color.org; rich heeds it


def console(quiet: bool = False) -> Console:
    """Standard output, as wide as the terminal; where there is none, as COLUMNS says, or `WIDE`."""
    from rich.console import Console

    asked = os.environ.get("COLUMNS", "")
    width = None if sys.stdout.isatty() or asked.isdecimal() else WIDE
    return Console(quiet=quiet, width=width)


def plain(console: Console) -> bool:
    """True where `--plain` or its variable asks for it, or the terminal says that it is dumb (TERM=dumb)."""
    return bool(os.environ.get(PLAIN)) or console.is_dumb_terminal


@contextmanager
def plainly() -> Iterator[None]:
    """Inside, everything is written plainly, by the processes that are started, too."""
    before = {name: os.environ.get(name) for name in (PLAIN, _NO_COLOUR)}
    os.environ.update(dict.fromkeys(before, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def say(console: Console, text: str, style: str = "") -> None:
    """Prints a sentence, wrapped at words; plainly, on one line."""
    from rich.text import Text

    whole = plain(console)
    console.print(Text(text, style="" if whole else style), soft_wrap=whole)
