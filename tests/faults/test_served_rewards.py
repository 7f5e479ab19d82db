"""`aegpo serve-reward` under attack: statuses that say whose mistake it is, no traceback, no token, little memory."""

from __future__ import annotations

import base64
import gzip
import json
import os
import random
import signal
import socket
import struct
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from served import (
    CAPTION,
    JSON,
    KNOWN,
    OCTETS,
    SECRET,
    Evil,
    Served,
    batch,
    png,
    prompts_of,
    raw_tensor,
    serving,
    shown,
    status_of,
    tensor,
)

MOST_BYTES = 2_000_000
FEW_BYTES = 200_000_000  # of memory that any request may cost
BEARER = b"Authorization: Bearer " + SECRET.encode() + b"\r\n"
POST = b"POST /score HTTP/1.1\r\nHost: x\r\n"
GET = b"GET /health HTTP/1.1\r\nHost: x\r\n"
PIXEL = bytes(12)


@pytest.fixture(scope="module")
def one_for_all() -> Iterator[Served]:
    with serving("--port", 0, "--token-env", "TOK", "--max-bytes", MOST_BYTES, TOK=SECRET) as server:
        yield server


@pytest.fixture
def server(one_for_all) -> Iterator[Served]:
    """After each attack it lives, scores, and has said nothing that it should not."""
    before, memory = len(one_for_all.logged), one_for_all.most_memory
    yield one_for_all
    time.sleep(0.05)
    logged = one_for_all.logged[before:]
    assert "Traceback" not in logged, logged
    assert SECRET not in logged
    assert one_for_all.process.poll() is None
    assert one_for_all.most_memory - memory < FEW_BYTES
    assert one_for_all.ask(body=batch(), headers=OCTETS | KNOWN)[0] == 200


# --- who asks ---------------------------------------------------------------------------------------------------------

STRANGERS = {
    "no token": {},
    "wrong token": {"Authorization": "Bearer nope"},
    "token of other case": {"Authorization": f"bearer {SECRET}"},
    "latin-1 token": {"Authorization": "Bearer \xe9\xff"},
    "token and more": {"Authorization": f"Bearer {SECRET}x"},
    "no scheme": {"Authorization": SECRET},
}


def test_good(server):
    status, answer = server.ask(body=batch(), headers=OCTETS | KNOWN)
    assert (status, len(json.loads(answer)["scores"])) == (200, 2)


@pytest.mark.parametrize("who", STRANGERS)
@pytest.mark.parametrize("what", [("POST", "/score"), ("GET", "/health")], ids=["score", "health"])
def test_a_stranger_is_401(what, who, server):
    status, answer = server.ask(*what, body=batch(), headers=OCTETS | STRANGERS[who])
    assert status == 401
    assert SECRET.encode() not in answer


def test_two_tokens_are_none(server):
    said = POST + b"Authorization: Bearer no\r\n" + BEARER + b"Content-Length: 0\r\n\r\n"
    assert status_of(server.say(said)) in (400, 401)


# --- how much is sent -------------------------------------------------------------------------------------------------


def test_oversize_and_honest_about_it_is_413(server):
    assert server.ask(body=b"x" * 3_000_000, headers=OCTETS | KNOWN)[0] == 413


def test_oversize_without_a_token_is_not_read(server):
    assert server.ask(body=b"x" * 30_000_000, headers=OCTETS)[0] in (0, 401, 413)  # 0: it hung up before the end


def test_oversize_in_chunks_is_413(server):
    head = POST + b"Transfer-Encoding: chunked\r\nContent-Type: application/octet-stream\r\n" + BEARER + b"\r\n"
    said = head + (b"10000\r\n" + b"x" * 65_536 + b"\r\n") * 64 + b"0\r\n\r\n"
    assert status_of(server.say(said)) == 413


def test_a_body_that_breaks_off_is_nobodys_failure(server):
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(POST + BEARER + b"Content-Length: 1000\r\n\r\nhalf")


# --- bytes that are hardly HTTP ---------------------------------------------------------------------------------------

SMUGGLED = b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
BYTES = {
    "negative length": POST + b"Content-Length: -5\r\n\r\n",
    "length of words": POST + b"Content-Length: abc\r\n\r\n",
    "two lengths": POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",
    "huge length": POST + BEARER + b"Content-Length: " + b"9" * 30 + b"\r\n\r\n",
    "length and chunked (smuggling)": SMUGGLED + GET + b"\r\n",
    "te.te": POST + b"Transfer-Encoding: xchunked\r\nContent-Length: 5\r\n\r\nhello",
    "no request": b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03" + os.urandom(500),
    "long line": b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\n\r\n",
    "many headers": GET + b"".join(b"X-%d: y\r\n" % at for at in range(20_000)) + b"\r\n",
    "bare lf": b"GET /health HTTP/1.1\nHost: x\n\n",
    "http/0.9": b"GET /health\r\n",
    "obs-fold": GET + b" Authorization: y\r\n\r\n",
}


@pytest.mark.parametrize("what", BYTES)
def test_bytes_that_are_hardly_http_are_a_wrong_request(what, server):
    answer = server.say(BYTES[what])
    assert status_of(answer) in (0, 400, 401, 404, 413, 422, 431), answer[:300]
    assert b'"status"' not in answer  # of /health, which a stranger is not told, smuggled or not


# --- places and methods -----------------------------------------------------------------------------------------------

PATHS = ["/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "//etc/passwd", "/score/../../health", "/docs"]
PATHS += ["/openapi.json", "/redoc", "/static/../x", "/\0"]


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_there_is_nothing_but_two_places(path, server):
    head = f"GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {SECRET}\r\nConnection: close\r\n\r\n"
    answer = server.say(head.encode("latin-1"))
    assert status_of(answer) in (0, 400, 404, 405)
    assert b"root:" not in answer


@pytest.mark.parametrize("method", ["PUT", "DELETE", "TRACE", "OPTIONS", "CONNECT", "PATCH", "HEAD"])
def test_scores_are_asked_for_by_post_alone(method, server):
    assert server.ask(method, headers=KNOWN)[0] in (400, 404, 405)


# --- pickles ----------------------------------------------------------------------------------------------------------


def test_no_pickle_is_read(server, tmp_path):
    evil = Evil(tmp_path / "was-here").pickled()
    hidden = tensor(PIXEL, [1, 3, 1, 1], prompts_of("x"), pickle=base64.b64encode(evil).decode())
    assert server.ask(body=evil, headers=OCTETS | KNOWN)[0] == 400
    assert server.ask(body=hidden, headers=OCTETS | KNOWN)[0] in (200, 400, 422)
    assert server.ask(body=batch() + evil, headers=OCTETS | KNOWN)[0] == 400
    assert not list(tmp_path.iterdir())


# --- bodies -----------------------------------------------------------------------------------------------------------


def floats(value: float, count: int = 12) -> bytes:
    return struct.pack("<f", value) * count


GOOD = png(24, 24, b"\x80\x10\x20")
DEEP = {"request": '{"protocol": 3, "prompts": ' + "[" * 100_000}
DEEP_METADATA = '{"protocol": 3, "prompts": [{"index": 0, "text": "x", "images": [], "metadata": {"a": %s}}]}'
OCTET_BODIES = {
    "no body": b"",
    "header longer than the body": struct.pack("<Q", 10**9) + b"{}",
    "header of 2^64": b"\xff" * 16,
    "NaN pixels": tensor(floats(float("nan")), [1, 3, 2, 2], prompts_of("x")),
    "pixels of 2": tensor(floats(2.0), [1, 3, 2, 2], prompts_of("x")),
    "no images": tensor(b"", [0, 3, 2, 2], []),
    "images of no dimension": tensor(bytes(4), [], prompts_of("x")),
    "overflowing shape": tensor(PIXEL, [2**40, 2**40, 3, 1], prompts_of("x")),
    "other name": tensor(PIXEL, [1, 3, 1, 1], prompts_of("x"), "image"),
    "float64": tensor(bytes(24), [1, 3, 1, 1], prompts_of("x"), dtype="F64"),
    "bfloat16": tensor(bytes(6), [1, 3, 1, 1], prompts_of("x"), dtype="BF16"),
    "unknown dtype": tensor(PIXEL, [1, 3, 1, 1], prompts_of("x"), dtype="XX"),
    "prompts missing": tensor(PIXEL, [1, 3, 1, 1], None),
    "prompts of numbers": tensor(PIXEL, [1, 3, 1, 1], prompts_of(3)),
    "prompts nested 10000 deep": raw_tensor(PIXEL, [1, 3, 1, 1], DEEP),
    "metadata nested 900 deep": raw_tensor(PIXEL, [1, 3, 1, 1], {"request": DEEP_METADATA % ("[" * 900 + "]" * 900)}),
    "surrogate prompt": tensor(PIXEL, [1, 3, 1, 1], prompts_of("\ud800")),
    "request in no JSON": raw_tensor(PIXEL, [1, 3, 1, 1], {"request": "\x00"}),
}
JSON_BODIES = {
    "json garbage": b"{",
    "json list": b"[]",
    "json no images": b'{"images": [], "prompts": []}',
    "json image of number": shown(images=[3], prompts=prompts_of("x")),
    "json image null": shown(images=[None], prompts=prompts_of("x")),
    "json utf-16": "{}".encode("utf-16"),
    "json surrogate": shown(GOOD, prompts=prompts_of("\ud800")),
    "json deep": b"[" * 100_000,
    "json deep dict": b'{"images":' * 50_000,
    "json huge int": b'{"images": ' + b"9" * 100_000 + b"}",
    "json huge index": shown(GOOD).replace(b'"index": 0', b'"index": ' + b"9" * 5000),
    "index of true": shown(GOOD).replace(b'"index": 0', b'"index": true'),
    "file that no prompt names": shown(GOOD, files=["AAAA"]),
    "empty file": shown(GOOD, prompts=[prompts_of(CAPTION)[0] | {"images": [0]}], files=[""]),
}


@pytest.mark.parametrize("what", OCTET_BODIES)
def test_body_of_octets(what, server):
    status, answer = server.ask(body=OCTET_BODIES[what], headers=OCTETS | KNOWN)
    assert status == 400, answer
    assert json.loads(answer)["detail"]


@pytest.mark.parametrize("what", JSON_BODIES)
def test_body_of_json(what, server):
    status, answer = server.ask(body=JSON_BODIES[what], headers=JSON | KNOWN)
    assert status == 400, answer
    assert json.loads(answer)["detail"]


OTHER_BODIES = {
    "form": (b"a=b", {"Content-Type": "application/x-www-form-urlencoded"}),
    "no content type": (batch(), {}),
    "gzip body": (gzip.compress(batch()), OCTETS | {"Content-Encoding": "gzip"}),
}


@pytest.mark.parametrize("what", OTHER_BODIES)
def test_body_of_another_kind(what, server):
    body, headers = OTHER_BODIES[what]
    assert server.ask(body=body, headers=headers | KNOWN)[0] == 400


def test_prompt_of_1_mb(server):
    body = tensor(PIXEL, [1, 3, 1, 1], prompts_of("x " * 500_000))
    assert server.ask(body=body, headers=OCTETS | KNOWN)[0] in (200, 400, 413, 422)


# --- what is small on the wire and large in memory --------------------------------------------------------------------

BOMB = png(9000, 9000)
LARGE = {
    "PNG of 81 Mpx": shown(BOMB),
    "PNG of 400 Mpx": shown(png(20_000, 20_000)),
    "50 PNGs of 1 Mpx": shown(*[png(1000, 1000)] * 50),
    "a million lists": b'{"images": [' + b"[]," * 600_000 + b"[]]}",
    "a hundred thousand files": shown(GOOD, files=["AA=="] * 100_000),
}


@pytest.mark.parametrize("what", LARGE)
def test_what_would_be_large_in_memory_is_refused_before_it_is(what, server):
    assert len(LARGE[what]) < MOST_BYTES
    status, answer = server.ask(body=LARGE[what], headers=JSON | KNOWN, seconds=120)
    assert status in (400, 413), answer


def test_png_good(server):
    assert server.ask(body=shown(GOOD), headers=JSON | KNOWN)[0] == 200


def test_300_corrupt_pngs(server, request):
    draw = random.Random(request.config.getoption("--fault-seed") + 1)
    for _ in range(300):
        corrupt = bytearray(GOOD)
        for _ in range(draw.choice([1, 1, 2, 4])):
            corrupt[draw.randrange(len(corrupt))] = draw.randrange(256)
        if draw.random() < 0.3:
            del corrupt[draw.randrange(len(corrupt)) :]
        status, answer = server.ask(body=shown(bytes(corrupt)), headers=JSON | KNOWN)
        assert status in (200, 400, 413, 422), (bytes(corrupt), answer)  # 413: it says it has millions of pixels


@pytest.mark.parametrize("kind", ["octets", "json"])
def test_300_corrupt_bodies(kind, server, request):
    draw = random.Random(request.config.getoption("--fault-seed") + 2)
    body, headers = (batch(), OCTETS) if kind == "octets" else (shown(GOOD, GOOD), JSON)
    telling = min(700, len(body))  # bytes, of which most are the header
    for _ in range(300):
        corrupt = bytearray(body)
        for _ in range(draw.choice([1, 1, 2, 4])):
            corrupt[draw.randrange(telling)] = draw.randrange(256)
        if draw.random() < 0.3:
            del corrupt[draw.randrange(len(corrupt)) :]
        status, answer = server.ask(body=bytes(corrupt), headers=headers | KNOWN)
        assert status in (200, 400, 413, 422), (bytes(corrupt[:telling]), answer)


# --- many at a time ---------------------------------------------------------------------------------------------------


def test_50_clients_and_500_requests(server):
    body = batch(4)
    with ThreadPoolExecutor(50) as pool:
        asked = [pool.submit(server.ask, body=body, headers=OCTETS | KNOWN, seconds=60) for _ in range(500)]
        answers = {each.result() for each in asked}
    assert [status for status, _ in answers] == [200]


def test_300_idle_connections_beside(server):
    idle = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(300)]
    for connection in idle:
        connection.sendall(POST + b"Content-Le")
    assert server.ask(body=batch(), headers=OCTETS | KNOWN)[0] == 200
    for connection in idle:
        connection.close()


# --- where it listens -------------------------------------------------------------------------------------------------


def test_it_listens_on_this_machine_alone_and_its_token_is_in_no_list_of_processes(server):
    lines = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()]
    at = [line[1] for line in lines if line[3] == "0A" and line[1].endswith(f":{server.port:04X}")]
    assert at == [f"0100007F:{server.port:04X}"]
    assert SECRET.encode() not in Path(f"/proc/{server.process.pid}/cmdline").read_bytes()


@pytest.mark.parametrize("host", ["0.0.0.0", "", "::", "0", "127.1", "127.0.0.2"])
def test_a_host_without_a_token_is_refused(host, warm, tmp_path):
    ended = warm(["serve-reward", "palette", "--host", host, "--port", "0"], tmp_path)
    assert ended.code == 2
    assert "token" in ended.error
    assert not ended.traceback


def test_ctrl_c_ends_it_at_once():
    with serving("--port", 0) as server:
        server.process.send_signal(signal.SIGINT)
        server.process.wait(20)
        assert "Traceback" not in server.logged
