"""Ports for processes that find each other a while after the port was chosen."""

from __future__ import annotations

import itertools
import os
import socket

FIRST, COUNT = 20_000, 12_000  # all below 32768: from there on the kernel hands out ports, by then perhaps this one
_turns = itertools.count()


def free_port() -> int:
    """One that nobody listens on; another process of the tests, or another call, begins to look elsewhere."""
    while True:
        port = FIRST + (os.getpid() * 97 + next(_turns)) % COUNT
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
        return port
