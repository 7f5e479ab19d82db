"""One exchange with a server: bounded in time, from the question's last byte to the answer's, and in bytes.

A read that waits as long as `timeout` says begins anew with every byte, so a server that says one now and then is never
late. Here a watch hangs up when the whole answer is late, whatever it is that comes so slowly.
"""

from __future__ import annotations

import socket
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from requests import PreparedRequest, Response
from requests.adapters import HTTPAdapter
from urllib3 import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.connection import HTTPConnection, HTTPSConnection

_PIECE = 2**16  # bytes read, or decompressed, at a time
_GZIP_OR_ZLIB = 32 + zlib.MAX_WBITS  # whichever of both its first bytes say
_PACKED = ("gzip", "x-gzip", "deflate")


class LateError(Exception):
    """The answer was not whole in time."""


class UnreadableError(Exception):
    """The answer cannot be taken: too large, or packed in a way that is none; asking again would not help."""


class Bearer:
    """The token, if there is one, and nothing else: without an `auth` of its own requests takes one of ~/.netrc."""

    def __init__(self, token: str | None) -> None:
        self._token = token

    def __call__(self, request: PreparedRequest) -> PreparedRequest:
        """Adds the header."""
        if self._token is not None:
            request.headers["Authorization"] = f"Bearer {self._token}"
        return request


class Patience:
    """How long one answer is waited for, from the moment when its question is asked."""

    def __init__(self, seconds: float) -> None:
        self.late = False
        self._seconds = seconds
        self._timer: threading.Timer | None = None

    def begin(self, connection: socket.socket) -> None:
        """The question is asked."""
        self.end()
        self._timer = threading.Timer(self._seconds, self._hang_up, (connection,))
        self._timer.daemon = True
        self._timer.start()

    def end(self) -> None:
        """The answer is there, or will not be."""
        if self._timer is not None:
            self._timer.cancel()

    def _hang_up(self, connection: socket.socket) -> None:
        self.late = True
        with suppress(OSError):  # it is closed already
            socket.socket.shutdown(connection, socket.SHUT_RDWR)  # of TLS as well, whose own method would wait


class Watch(threading.local):
    """What each thread waits for."""

    patience: Patience | None = None

    @contextmanager
    def over(self, seconds: float) -> Iterator[None]:
        """Inside, an answer has so many seconds; raises `LateError` in place of what hanging up looks like."""
        self.patience = patience = Patience(seconds)
        try:
            yield
        except Exception as error:
            if patience.late:
                raise _late(seconds) from error
            raise
        finally:
            patience.end()
        if patience.late:  # hanging up may look like the end of an answer
            raise _late(seconds)

    def begin(self, connection: socket.socket | None) -> None:
        """The question is asked."""
        if self.patience is not None and connection is not None:
            self.patience.begin(connection)


def _late(seconds: float) -> LateError:
    return LateError(f"the answer was not whole after {seconds:g} s")


class Adapter(HTTPAdapter):  # type: ignore[misc]  # requests has no types
    """Connections that a watch knows of."""

    def __init__(self, watch: Watch, connections: int) -> None:
        self._pools = _pools(watch)
        super().__init__(pool_maxsize=connections)

    def init_poolmanager(self, *args: Any, **settings: Any) -> None:
        """As requests makes it."""
        super().init_poolmanager(*args, **settings)
        self.poolmanager.pool_classes_by_scheme = self._pools

    def proxy_manager_for(self, *args: Any, **settings: Any) -> Any:
        """As requests makes it."""
        manager = super().proxy_manager_for(*args, **settings)
        manager.pool_classes_by_scheme = self._pools
        return manager


def _pools(watch: Watch) -> dict[str, type]:
    class Plain(HTTPConnection):
        def getresponse(self) -> Any:
            watch.begin(self.sock)
            return super().getresponse()

    class Secure(HTTPSConnection):
        def getresponse(self) -> Any:
            watch.begin(self.sock)
            return super().getresponse()

    # The names of the pools are in what goes wrong.
    plain = type("HTTPConnectionPool", (HTTPConnectionPool,), {"ConnectionCls": Plain})
    return {"http": plain, "https": type("HTTPSConnectionPool", (HTTPSConnectionPool,), {"ConnectionCls": Secure})}


def read(answer: Response, most: int) -> bytes:
    """The body of an answer that was asked for with `stream`, unpacked.

    Raises:
        UnreadableError: if it is larger, which is noticed before it is read or unpacked; or packed in another way than
            gzip or deflate, or badly.
    """
    body = beginning(answer, most + 1)
    if len(body) > most:
        raise UnreadableError(f"the answer has more than {most} bytes")
    return body


def beginning(answer: Response, most: int) -> bytes:
    """The first bytes of the body, unpacked, without reading or unpacking many more."""
    packing = answer.headers.get("Content-Encoding", "").strip().lower()
    unpack = _as_it_is if packing in ("", "identity") else _unpacking(packing)
    body = bytearray()
    while len(body) < most:
        piece = answer.raw.read(_PIECE, decode_content=False)
        body += unpack(piece, most - len(body))
        if not piece:
            break
    return bytes(body[:most])


def _as_it_is(piece: bytes, most: int) -> bytes:
    return piece


def _unpacking(packing: str) -> Callable[[bytes, int], bytes]:
    if packing not in _PACKED:
        raise UnreadableError(f"the answer is packed with {packing!r:.40}, which was not asked for")
    unpacker = zlib.decompressobj(_GZIP_OR_ZLIB)

    def unpack(piece: bytes, most: int) -> bytes:
        if not piece and not unpacker.eof:
            raise UnreadableError(f"the answer is packed with {packing!r}, and breaks off")
        try:
            return unpacker.decompress(piece, most)
        except zlib.error as error:
            raise UnreadableError(f"the answer is no {packing!r}, which it says it is packed with: {error}") from None

    return unpack
