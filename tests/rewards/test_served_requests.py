"""What `aegpo serve-reward` says to requests that are wrong or too much, each a mistake of who asks."""

from __future__ import annotations

import base64
import json
import socket

import pytest
import requests
import torch
from test_remote_prompts import in_a_thread

from aegpo.commands.serve_reward import Scoring, make_app
from aegpo.rewards.palette import PaletteReward
from aegpo.rewards.wire import JSON, png

KNOWN = {"Authorization": "Bearer s3cret", "Content-Type": JSON}


@pytest.fixture(scope="module")
def palette():
    with in_a_thread(make_app(Scoring(PaletteReward(), PaletteReward()), "s3cret", 30_000)) as url:
        yield url


@pytest.mark.parametrize("token", ["caf\xe9", "s3cret\xff", ""])
def test_a_header_of_whatever_bytes_is_an_unknown_token(token, palette):
    headers = {"Authorization": f"Bearer {token}".encode("latin-1")}
    assert requests.get(f"{palette}/health", headers=headers, timeout=20).status_code == 401


def test_pixels_count_for_the_limit_before_they_are_there(palette):
    wide = base64.b64encode(png(torch.zeros(3, 200, 200))).decode()
    body = json.dumps({"protocol": 3, "images": [wide], "prompts": []})
    answer = requests.post(f"{palette}/score", data=body, headers=KNOWN, timeout=20)
    assert answer.status_code == 413
    assert answer.json()["detail"].startswith("image 0 of 200 x 200 pixels and what came before take more than 30000")


def test_a_body_that_is_packed_is_not_unpacked(palette):
    answer = requests.post(f"{palette}/score", data=b"", headers=KNOWN | {"Content-Encoding": "gzip"}, timeout=20)
    assert (answer.status_code, answer.json()["detail"]) == (400, "content encoding 'gzip'; 'identity' was expected")


def test_a_body_that_breaks_off_is_no_failure_of_the_server(palette, caplog):
    port = int(palette.rsplit(":", 1)[1])
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(b"POST /score HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer s3cret\r\n")
        connection.sendall(b"Content-Length: 1000\r\n\r\nhalf")
    assert requests.get(f"{palette}/health", headers=KNOWN, timeout=20).status_code == 200
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
