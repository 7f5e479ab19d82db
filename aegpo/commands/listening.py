"""The addresses that commands serve at."""

from __future__ import annotations

import socket

from aegpo.errors import AegpoError


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 is any that is free.

    Raises:
        AegpoError: if the address is taken or is none of this machine.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise AegpoError(f"{host}:{port} cannot be served at: {error.strerror}; choose another --port") from error


def address(listening: socket.socket) -> str:
    """Where a socket listens: ``http://127.0.0.1:8000``."""
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
