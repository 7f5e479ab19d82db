"""A plugin that sends a signal from inside a run, after an exact step: nobody outside has to be quick."""

from __future__ import annotations

import signal
from pathlib import Path

NAME = "signals.py"
LOADED = ("--plugin", NAME)  # the words of a command in the plugin's folder
# It is told after the trackers, so the step's row is written.
PLUGIN = """
import os
import aegpo

@aegpo.hookimpl
def aegpo_on_step_end(run, report):
    if report.step == int(os.environ.get("SIGNAL_AFTER", 0)):
        os.kill(int(os.environ.get("SIGNAL_TO", os.getpid())), int(os.environ["SIGNAL"]))
"""


def write_plugin(folder: Path) -> None:
    """Puts the plugin into a folder; it does nothing unless the variables of `after` are set."""
    (folder / NAME).write_text(PLUGIN)


def after(step: int, number: signal.Signals, to: int | None = None) -> dict[str, str]:
    """Variables with which the run sends a signal after a step: to a process by its id, or to itself."""
    told = {} if to is None else {"SIGNAL_TO": str(to)}
    return {"SIGNAL_AFTER": str(step), "SIGNAL": str(int(number)), **told}
