"""Where a command's tables go."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

WIDE = 160  # columns where the output is no terminal


def console() -> Console:
    """As wide as the terminal, or `WIDE` where there is none."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=WIDE)
