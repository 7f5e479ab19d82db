"""A process of `aegpo serve-reward palette`, and bodies and raw bytes to send it."""

from __future__ import annotations

import base64
import http.client
import json
import os
import pickle
import re
import socket
import struct
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from warm import CALM

SECRET = "S3CR3T-4711-do-not-show"
CAPTION = "a red circle on a blue background"
OCTETS = {"Content-Type": "application/octet-stream"}
JSON = {"Content-Type": "application/json"}
KNOWN = {"Authorization": f"Bearer {SECRET}"}


@dataclass
class Served:
    """A server, where it listens, and what it wrote to its log."""

    process: subprocess.Popen[str]
    port: int
    log: Path

    def ask(
        self,
        method: str = "POST",
        path: str = "/score",
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
        seconds: float = 20,
    ) -> tuple[int, bytes]:
        """Status and body of the answer; 0 and the error without one."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=seconds)
        try:
            connection.request(method, path, body, dict(headers or {}))
            answer = connection.getresponse()
            return answer.status, answer.read()
        except (OSError, http.client.HTTPException) as error:
            return 0, repr(error).encode()
        finally:
            connection.close()

    def say(self, data: bytes, seconds: float = 3) -> bytes:
        """What it answers to any bytes, until it is silent."""
        got = b""
        with socket.create_connection(("127.0.0.1", self.port)) as connection:
            connection.settimeout(seconds)
            try:
                connection.sendall(data)
                while piece := connection.recv(65_536):
                    got += piece
            except OSError:
                pass
        return got

    @property
    def logged(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def most_memory(self) -> int:
        """The peak so far, bytes."""
        found = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{self.process.pid}/status").read_text())
        return int(found[1]) * 1024


@contextmanager
def serving(*words: object, **environment: str) -> Iterator[Served]:
    """A server for the time of a test."""
    with tempfile.NamedTemporaryFile(prefix="aegpo-served-", suffix=".log") as log:
        command = [sys.executable, "-m", "aegpo", "serve-reward", "palette", *map(str, words)]
        variables = os.environ | CALM | environment
        process = subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=log, text=True)
        line = process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+)", line)
        assert found, line + Path(log.name).read_text()
        try:
            yield Served(process, int(found[1]), Path(log.name))
        finally:
            process.kill()
            process.wait()
            process.stdout.close()


def status_of(answer: bytes) -> int:
    """The status of raw bytes, 0 if they are no answer."""
    return int(answer.split()[1]) if answer.startswith(b"HTTP/") else 0


def prompts_of(*texts: object) -> list[dict[str, object]]:
    return [{"index": at, "text": text, "metadata": {}, "images": []} for at, text in enumerate(texts)]


def tensor(
    images: bytes, shape: list[int], prompts: object, name: str = "images", dtype: str = "F32", **metadata: str
) -> bytes:
    """A safetensors body of one tensor, whatever it is."""
    request = json.dumps({"protocol": 3, "prompts": prompts})
    return raw_tensor(images, shape, {"request": request, **metadata}, name, dtype)


def raw_tensor(
    images: bytes, shape: list[int], metadata: Mapping[str, str], name: str = "images", dtype: str = "F32"
) -> bytes:
    held = {"dtype": dtype, "shape": shape, "data_offsets": [0, len(images)]}
    header = json.dumps({"__metadata__": dict(metadata), name: held}).encode()
    return struct.pack("<Q", len(header)) + header + images


def batch(count: int = 2, size: int = 24) -> bytes:
    """A body that is right."""
    pixels = struct.pack("<f", 0.5) * (count * 3 * size * size)
    return tensor(pixels, [count, 3, size, size], prompts_of(*[CAPTION] * count))


def shown(*pictures: bytes, prompts: object = None, **others: object) -> bytes:
    """A JSON body of PNG files."""
    images = [base64.b64encode(picture).decode() for picture in pictures]
    wanted = prompts_of(*[CAPTION] * len(pictures)) if prompts is None else prompts
    return json.dumps({"protocol": 3, "images": images, "prompts": wanted, **others}).encode()


def png(width: int, height: int, colour: bytes = b"\0\0\0") -> bytes:
    """A picture of one colour, small however large it is."""
    packer, line = zlib.compressobj(9), b"\0" + colour * width
    data = b"".join(packer.compress(line) for _ in range(height)) + packer.flush()
    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", size) + _chunk(b"IDAT", data) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


class Evil:
    """Leaves a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)

    def pickled(self) -> bytes:
        return pickle.dumps(self)
