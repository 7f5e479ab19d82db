"""A reward server on loopback that scores by the bytes it is sent, and misbehaves in the way it is told to."""

from __future__ import annotations

import json
import os
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

MIB = 2**20
PATIENCE = 25  # seconds that an endless answer goes on, more than any run here waits


@dataclass
class Behaviour:
    """What the server does from which question on, and what it has seen."""

    fault: str | None = None
    honest: int = 0  # questions that are answered as they should be, before
    asked: int = 0
    stolen: int = 0  # requests that came to where a redirect points
    tokens: list[str | None] = field(default_factory=list)

    def begin(self, fault: str | None, honest: int = 0) -> None:
        self.fault, self.honest, self.asked, self.stolen = fault, honest, 0, 0


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    behaviour: Behaviour  # of the server's own subclass

    def log_message(self, *words: object) -> None:
        pass

    def reply(self, status: int, body: bytes, *headers: tuple[str, str]) -> None:
        self.begin(status, ("Content-Length", str(len(body))), *headers)
        self.wfile.write(body)

    def begin(self, status: int, *headers: tuple[str, str]) -> None:
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()

    def say(self, pieces: Iterable[bytes], every: float = 0.0) -> None:
        for piece in pieces:
            self.wfile.write(piece)
            self.wfile.flush()
            time.sleep(every)

    def break_off(self) -> None:
        self.wfile.flush()
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def do_GET(self) -> None:
        self.behaviour.stolen += self.path == "/stolen"
        if self.behaviour.fault == "health hangs":
            time.sleep(PATIENCE)
        if self.behaviour.fault == "health 500":
            return self.reply(500, b"no")
        return self.reply(200, b'{"protocol": 3}')

    def do_POST(self) -> None:
        self.behaviour.stolen += self.path == "/stolen"
        self.behaviour.tokens.append(self.headers.get("Authorization"))
        scores = honest_scores(self.rfile.read(int(self.headers.get("Content-Length", 0))))
        self.behaviour.asked += 1
        fault = self.behaviour.fault if self.behaviour.asked > self.behaviour.honest else None
        try:
            if fault is None or fault.startswith("health"):
                self.reply(200, answer(scores))
            else:
                FAULTS[fault](self, scores)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True


def honest_scores(body: bytes) -> list[float]:
    """A number in [0, 1) of the bytes of each image of a safetensors body."""
    length = struct.unpack("<Q", body[:8])[0]
    tensor = json.loads(body[8 : 8 + length])["images"]
    begin, end = tensor["data_offsets"]
    count = tensor["shape"][0]
    size = (end - begin) // count
    raw = body[8 + length :]
    return [zlib.crc32(raw[begin + at * size : begin + (at + 1) * size]) / 2**32 for at in range(count)]


def answer(scores: object) -> bytes:
    return json.dumps({"scores": scores}).encode()


def gzip_bomb(mebibytes: int) -> bytes:
    """A gzip file of blanks, of a thousandth of its size; its check sum, which nobody comes to, is wrong."""
    packer = zlib.compressobj(1, zlib.DEFLATED, -zlib.MAX_WBITS)
    block = packer.compress(b" " * MIB) + packer.flush(zlib.Z_FULL_FLUSH)
    return b"\x1f\x8b\x08\0\0\0\0\0\0\xff" + block * mebibytes + b"\x03\0" + bytes(8)


Fault = Callable[[Handler, list[float]], None]


def _whole(status: int, body: bytes | Callable[[list[float]], bytes], *headers: tuple[str, str]) -> Fault:
    def act(handler: Handler, scores: list[float]) -> None:
        handler.reply(status, body if isinstance(body, bytes) else body(scores), *headers)

    return act


def _each(text: str) -> Callable[[list[float]], bytes]:
    """The same JSON for every score."""
    return lambda scores: f'{{"scores": [{", ".join([text] * len(scores))}]}}'.encode()


def _echo_token(handler: Handler, scores: list[float]) -> None:
    handler.reply(401, json.dumps({"detail": f"wrong: {handler.headers.get('Authorization')}"}).encode())


def _echo_headers(handler: Handler, scores: list[float]) -> None:
    handler.reply(500, json.dumps({"detail": f"headers {dict(handler.headers)}"}).encode())


def _echo_in_scores(handler: Handler, scores: list[float]) -> None:
    handler.reply(200, answer(handler.headers.get("Authorization")))


def _half(handler: Handler, scores: list[float]) -> None:
    good = answer(scores)
    handler.begin(200, ("Content-Length", str(len(good))))
    handler.wfile.write(good[: len(good) // 2])
    handler.break_off()


def _half_chunked(handler: Handler, scores: list[float]) -> None:
    handler.begin(200, ("Transfer-Encoding", "chunked"))
    handler.wfile.write(b"20\r\n" + answer(scores)[:10])
    handler.break_off()


def _reset(handler: Handler, scores: list[float]) -> None:
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.close_connection = True
    handler.connection.close()


def _never(handler: Handler, scores: list[float]) -> None:
    time.sleep(PATIENCE)


def _slowly(handler: Handler, scores: list[float]) -> None:
    good = answer(scores)
    handler.begin(200, ("Content-Length", str(len(good))))
    handler.say((bytes([byte]) for byte in good), every=0.9)


def _slow_headers(handler: Handler, scores: list[float]) -> None:
    handler.say((bytes([byte]) for byte in b"HTTP/1.1 200 OK\r\nServer: " + b"y" * 100), every=0.9)


def _endless_headers(handler: Handler, scores: list[float]) -> None:
    handler.say([b"HTTP/1.1 200 OK\r\n"])
    handler.say(b"X-%d: y\r\n" % at for at in range(100_000))


def _endless_header_line(handler: Handler, scores: list[float]) -> None:
    handler.say([b"HTTP/1.1 200 OK\r\nX: "])
    handler.say(b"y" * 65_536 for _ in range(3000))


def _no_http(handler: Handler, scores: list[float]) -> None:
    handler.close_connection = True
    handler.wfile.write(b"hello\r\n")


def _huge_body(handler: Handler, scores: list[float]) -> None:
    handler.begin(200, ("Content-Length", str(4096 * MIB)))
    handler.say(b" " * MIB for _ in range(4096))


def _endless_body(handler: Handler, scores: list[float]) -> None:
    handler.begin(200, ("Transfer-Encoding", "chunked"))
    handler.say((b"1\r\n \r\n" for _ in range(PATIENCE * 5)), every=0.2)


def _endless_trailers(handler: Handler, scores: list[float]) -> None:
    good = answer(scores)
    handler.begin(200, ("Transfer-Encoding", "chunked"))
    handler.say([b"%x\r\n%s\r\n0\r\n" % (len(good), good)])
    handler.say((b"X: y\r\n" for _ in range(PATIENCE * 5)), every=0.2)


def _endless_and_unmeasured(handler: Handler, scores: list[float]) -> None:
    handler.begin(200)  # neither a length nor chunks: it ends where the connection does
    handler.close_connection = True
    handler.say([answer(scores)])
    handler.say((b" " for _ in range(PATIENCE * 5)), every=0.2)


FAULTS: dict[str, Fault] = {
    "500": _whole(500, b"boom"),
    "429": _whole(429, b"{}", ("Retry-After", "1")),
    "503 html": _whole(503, b"<html>" + b"x" * 100_000),
    "garbage": _whole(200, lambda scores: os.urandom(1000)),
    "html": _whole(200, b"<html>hello</html>"),
    "empty": _whole(200, b""),
    "null": _whole(200, b"null"),
    "scores null": _whole(200, answer(None)),
    "text scores": _whole(200, lambda scores: answer([str(score) for score in scores])),
    "bool scores": _whole(200, _each("true")),
    "nested scores": _whole(200, lambda scores: answer([[score] for score in scores])),
    "too few": _whole(200, lambda scores: answer(scores[:-1])),
    "too many": _whole(200, lambda scores: answer([*scores, 1.0])),
    "nan": _whole(200, _each("NaN")),
    "1e400": _whole(200, _each("1e400")),
    "1e300": _whole(200, _each("1e300")),
    "big int": _whole(200, _each("1" + "0" * 400)),
    "huge int text": _whole(200, b'{"scores": [' + b"9" * 10_000 + b"]}"),
    "deep json": _whole(200, b"[" * 200_000),
    "redirect": _whole(307, b"", ("Location", "/stolen")),
    "401 echo": _echo_token,
    "500 echo": _echo_headers,
    "half": _half,
    "half chunked": _half_chunked,
    "reset": _reset,
    "never": _never,
    "slow loris": _slowly,
    "endless headers": _endless_headers,
    "endless header line": _endless_header_line,
    "http/0.9": _no_http,
    "bad gzip": _whole(200, b"\x1f\x8bnonsense", ("Content-Encoding", "gzip")),
    "gzip bomb": _whole(200, lambda scores: gzip_bomb(4096), ("Content-Encoding", "gzip")),
    "huge body": _huge_body,
    "endless body": _endless_body,
    # beyond those of the first list
    "200 echo": _echo_in_scores,
    "slow headers": _slow_headers,
    "endless trailers": _endless_trailers,
    "endless and unmeasured": _endless_and_unmeasured,
    "deep and closed json": _whole(200, b"[" * 1000 + b"]" * 1000),
    "a million lists": _whole(200, b"[" + b"[]," * 10**6 + b"[]]"),
    "unknown packing": _whole(200, b"{}", ("Content-Encoding", "br")),
    "bomb of a refusal": _whole(400, lambda scores: gzip_bomb(4096), ("Content-Encoding", "gzip")),
    "what a terminal obeys": _whole(400, b'{"detail": "\\u001b[2J\\nerror: all is well\\u202e"}'),
}
OF_HEALTH = ("health 500", "health hangs")


@contextmanager
def misbehaving() -> Iterator[tuple[str, Behaviour]]:
    """The address of a server, and what it does."""
    behaviour = Behaviour()

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *words: object) -> None:
            pass

    server = Server(("127.0.0.1", 0), type("Told", (Handler,), {"behaviour": behaviour}))
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", behaviour
    finally:
        server.shutdown()
        server.server_close()
