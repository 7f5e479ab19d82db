"""A command on a terminal of its own, and what its user types."""

from __future__ import annotations

import fcntl
import os
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Sequence
from pathlib import Path

PATIENCE = 300  # seconds
ROWS, COLUMNS = 40, 200
# A session of its own has the terminal only once it asks for it; then Ctrl-C is a signal.
TAKES_IT = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


class Terminal:
    """A terminal on which Python runs a command."""

    def __init__(self, words: Sequence[str], folder: Path) -> None:
        """Starts it.

        Args:
            words: after the interpreter's name.
            folder: where they mean what they say.
        """
        self._ours, its = os.openpty()
        fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm-256color"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", TAKES_IT, *words],
            cwd=folder,
            env=environment,
            start_new_session=True,
            stdin=its,
            stdout=its,
            stderr=its,
        )
        os.close(its)
        self._said = bytearray()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def text(self) -> str:
        """What it has shown by now."""
        return bytes(self._said).decode(errors="replace")

    def types(self, keys: str) -> None:
        """Types; "\\x03" is Ctrl-C."""
        os.write(self._ours, keys.encode())

    def ended(self) -> int:
        """The command's exit code, once all that it said is read."""
        code = self._process.wait(PATIENCE)
        self._reader.join(10)  # until nobody is on the terminal
        return code

    def close(self) -> None:
        """Closes the window: whatever still belongs to it gets SIGHUP."""
        os.close(self._ours)

    def _read(self) -> None:
        while True:
            try:
                said = os.read(self._ours, 65536)
            except OSError:  # nobody is left on it
                return
            if not said:
                return
            self._said += said
