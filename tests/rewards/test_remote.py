"""Reward `remote` against real servers: processes of `aegpo serve-reward`, and one in a thread that misbehaves."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise

import pytest
import requests
import torch
from command_line import aegpo, start

from aegpo.errors import AegpoError
from aegpo.models.shapes import ShapesSpec
from aegpo.prompts.lists import numbered
from aegpo.rewards.palette import PaletteReward
from aegpo.rewards.remote import RemoteReward
from aegpo.rewards.wire import SAFETENSORS, pack
from aegpo.testing import check_reward

pytest.importorskip("fastapi", reason='pip install "aegpo[serve]"')

CPU = torch.device("cpu")
PROMPTS = numbered(ShapesSpec().captions("evaluation", 7, 0))
IMAGES = torch.rand((7, 3, 24, 24), generator=torch.Generator().manual_seed(0))
QUICK = {"backoff": 0.05, "timeout": 20.0}
PATIENCE = 60  # seconds
TOKEN = {"AEGPO_TEST_TOKEN": "s3cret"}


def serve(*words: str) -> tuple[subprocess.Popen[str], str]:
    """A server, and its address as it prints it."""
    process = start("serve-reward", *words, stderr=None, **TOKEN)
    line = process.stdout.readline()
    assert " at http" in line, line
    return process, line.split(" at ")[1].strip()


@contextmanager
def served(*words: str):
    process, url = serve(*words)
    try:
        yield url
    finally:
        process.kill()
        process.wait(PATIENCE)
        process.stdout.close()


@pytest.fixture(scope="module")
def palette():
    with served("palette", "--port", "0", "--token-env", "AEGPO_TEST_TOKEN", "--max-bytes", "30000") as url:
        yield url


@pytest.fixture
def spec(palette, monkeypatch) -> RemoteReward:
    monkeypatch.setenv("AEGPO_TEST_TOKEN", "s3cret")
    return RemoteReward(url=palette, token_env="AEGPO_TEST_TOKEN", micro_batch=2, **QUICK)


# --- with aegpo serve-reward ------------------------------------------------------------------------------------------


def test_it_conforms(spec):
    check_reward(spec, PROMPTS, frames=0)


def test_scores_are_those_of_the_reward_itself_bit_for_bit(spec):
    assert torch.equal(spec.build(CPU).score(IMAGES, PROMPTS), PaletteReward().score(IMAGES, PROMPTS))


def test_json_scores_images_of_eight_bits(spec):
    rounded = (IMAGES * 255).round() / 255
    scores = spec.model_copy(update={"body": "json"}).build(CPU).score(IMAGES, PROMPTS)
    assert torch.equal(scores, PaletteReward().score(rounded, PROMPTS))


def test_one_image_at_a_time_and_all_at_once_are_the_same(spec):
    small = spec.model_copy(update={"micro_batch": 1, "concurrency": 1}).build(CPU).score(IMAGES, PROMPTS)
    assert torch.equal(small, spec.build(CPU).score(IMAGES, PROMPTS))


def test_the_token_is_needed_and_never_in_the_manifest(spec, palette, monkeypatch):
    assert "s3cret" not in spec.model_dump_json()
    with pytest.raises(AegpoError, match=r"/health refused: status 401: the header 'Authorization: Bearer TOKEN' is"):
        RemoteReward(url=palette, **QUICK).build(CPU)
    monkeypatch.setenv("AEGPO_TEST_TOKEN", "wrong")
    with pytest.raises(AegpoError, match="status 401"):
        spec.build(CPU)
    monkeypatch.delenv("AEGPO_TEST_TOKEN")
    with pytest.raises(AegpoError, match="'token_env' names 'AEGPO_TEST_TOKEN', which is not set"):
        spec.build(CPU)


def test_a_request_that_is_too_large_is_refused(spec):
    with pytest.raises(
        AegpoError, match=r"refused: status 413: the body is larger than 30000 bytes; send fewer images"
    ):
        spec.model_copy(update={"micro_batch": 7}).build(CPU).score(IMAGES, PROMPTS)


def test_a_body_without_its_length_is_read_no_further_than_the_limit(palette):
    headers = {"Authorization": "Bearer s3cret", "Content-Type": SAFETENSORS}
    answer = requests.post(f"{palette}/score", data=(bytes(1000) for _ in range(100)), headers=headers, timeout=20)
    assert answer.status_code == 413


def test_images_that_the_reward_refuses_are_not_sent_again(spec):
    begin = time.monotonic()
    with pytest.raises(AegpoError, match=r"/score refused: status 422: .*'no caption at all'"):
        spec.model_copy(update={"backoff": 20.0}).build(CPU).score(IMAGES[:1], numbered(["no caption at all"]))
    assert time.monotonic() - begin < 10


@pytest.mark.parametrize(
    ("content_type", "status", "message"),
    [("application/x-pickle", 400, "content type 'application/x-pickle'"), (SAFETENSORS, 400, "no safetensors file")],
)
def test_the_server_says_what_is_wrong_with_a_body(content_type, status, message, palette):
    headers = {"Authorization": "Bearer s3cret", "Content-Type": content_type}
    answer = requests.post(f"{palette}/score", data=b"nonsense", headers=headers, timeout=20)
    assert answer.status_code == status
    assert message in answer.json()["detail"]


def test_health_names_the_reward(palette):
    answer = requests.get(f"{palette}/health", headers={"Authorization": "Bearer s3cret"}, timeout=20)
    assert answer.json()["reward"]["kind"] == "palette"
    assert answer.json()["protocol"] == 3


@pytest.mark.slow
def test_a_server_that_was_restarted_goes_on_scoring():
    first, url = serve("palette", "--port", "0")
    scorer = RemoteReward(url=url, retries=12, backoff=0.5, timeout=20).build(CPU)
    before = scorer.score(IMAGES, PROMPTS)
    first.kill()
    first.wait(PATIENCE)
    answers = []
    asking = threading.Thread(target=lambda: answers.append(scorer.score(IMAGES, PROMPTS)))
    asking.start()
    second, _ = serve("palette", "--port", url.rsplit(":", 1)[1])
    asking.join(200)
    for process in (first, second):
        process.kill()
        process.wait(PATIENCE)
        process.stdout.close()
    assert torch.equal(answers[0], before)


def test_ctrl_c_ends_a_server():
    process, _ = serve("palette", "--port", "0")
    process.send_signal(signal.SIGINT)
    assert process.wait(PATIENCE) in (0, 130, -signal.SIGINT)
    process.stdout.close()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["hpsv3"], "no rewards part is called 'hpsv3'; did you mean 'hpsv2'?"),
        (["hpsv2", "--set", "verion=2"], "--set verion: unknown key; did you mean 'version'?"),
        (["palette", "--set", "weight"], "--set weight: there is no value; write  --set FIELD=VALUE"),
        (["palette", "--host", "0.0.0.0"], "--host 0.0.0.0 can be reached from other machines; name a variable"),
        (["palette", "--token-env", "NO_SUCH_TOKEN"], "--token-env names 'NO_SUCH_TOKEN', which is not set"),
        (["palette", "--port", "0", "--device", "cuda:9"], "--device cuda:9 was asked for, but torch sees"),
        (["hpsv2", "--port", "0", "--set", "path=/nowhere.pt"], "reward 'hpsv2': there is no file '/nowhere.pt'"),
    ],
)
def test_a_server_that_cannot_start_says_why(words, message):
    done = aegpo("serve-reward", *words)
    assert done.code == 2
    assert message in done.stderr


def test_an_address_that_is_taken_is_an_error(palette):
    port = palette.rsplit(":", 1)[1]
    done = aegpo("serve-reward", "palette", "--port", port)
    assert done.code == 2
    assert re.search(rf"127.0.0.1:{port} cannot be served at: .*; choose another --port", done.stderr)


# --- with servers that misbehave --------------------------------------------------------------------------------------


@contextmanager
def answering(answers):
    """A server that gives these (status, body, headers) in turn, the last for ever; yields its address, what it got."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            length = int(self.headers.get("Content-Length", 0))
            asked.append((time.monotonic(), self.rfile.read(length)))
            status, body, *headers = answers[min(len(asked), len(answers)) - 1]
            self.send_response(status)
            for header in headers:
                self.send_header(*header)
            self.end_headers()
            self.wfile.write(body.encode())

        def do_GET(self):
            self.do_POST()

        def log_message(self, *words):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


def scores(count: int) -> str:
    return json.dumps({"scores": [0.5] * count})


def ask(url: str, **changes):
    spec = RemoteReward(**{"url": url, "health": False, "concurrency": 1, **QUICK, **changes})
    return spec.build(CPU).score(IMAGES[:2], PROMPTS[:2])


def test_a_server_that_recovers_is_asked_again_after_growing_pauses():
    with answering([(503, "busy"), (500, "oops"), (429, "slow"), (200, scores(2))]) as (url, asked):
        assert ask(url, backoff=0.1).tolist() == [0.5, 0.5]
    times = [moment for moment, _ in asked]
    pauses = [later - earlier for earlier, later in pairwise(times)]
    assert [pause > least for pause, least in zip(pauses, (0.1, 0.2, 0.4), strict=True)] == [True] * 3
    assert len({body for _, body in asked}) == 1


def test_a_server_that_stays_away_is_an_error_with_its_last_words():
    with (
        answering([(503, '{"detail": "out of memory"}')]) as (url, asked),
        pytest.raises(
            AegpoError, match=r"reward 'remote': .*/score could not be asked in 3 attempts: status 503: out of"
        ),
    ):
        ask(url, retries=2)
    assert len(asked) == 3


def test_nobody_at_the_address_is_an_error_before_the_run_begins():
    with pytest.raises(AegpoError, match=r"/health could not be asked in 2 attempts: ConnectionError"):
        RemoteReward(url="http://127.0.0.1:9", retries=1, **QUICK).build(CPU)


def test_an_answer_that_comes_too_late_is_an_error():
    given_up = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            given_up.wait(PATIENCE)

        def log_message(self, *words):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    late = {"timeout": 0.2, "retries": 0, "health": False}
    reward = RemoteReward(url=f"http://127.0.0.1:{server.server_port}", **late).build(CPU)
    with pytest.raises(AegpoError, match=r"could not be asked in 1 attempts: ReadTimeout"):
        reward.score(IMAGES, PROMPTS)
    given_up.set()
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (200, "no json", "did not answer with JSON: 'no json'"),
        (200, "[0.5, 0.5]", r"the server answered \[0.5, 0.5\]; {\"scores\": \[...\]} was expected"),
        (200, '{"scores": ["a", "b"]}', "the server answered {'scores': "),
        (200, '{"scores": [true, false]}', "the server answered {'scores': "),
        (200, scores(3), "the server answered 3 scores for 2 images"),
        (404, "<html>", "refused: status 404: <html>"),
        (302, "", "refused: status 302"),
    ],
)
def test_an_answer_that_makes_no_sense_is_an_error_and_not_a_score(status, body, message):
    with answering([(status, body)]) as (url, asked), pytest.raises(AegpoError, match=message):
        ask(url)
    assert len(asked) == 1


def test_requests_go_out_at_the_same_time():
    together = threading.Barrier(3, timeout=20)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            together.wait()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(scores(1).encode())

        def log_message(self, *words):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    spec = RemoteReward(
        url=f"http://127.0.0.1:{server.server_port}", health=False, micro_batch=1, concurrency=3, **QUICK
    )
    assert spec.build(CPU).score(IMAGES[:3], PROMPTS[:3]).tolist() == [0.5] * 3
    server.shutdown()
    server.server_close()


def test_callers_that_ask_at_the_same_time_share_the_requests_that_are_allowed():
    under_way, most, turn = [0], [0], threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            with turn:
                under_way[0] += 1
                most[0] = max(most[0], under_way[0])
            time.sleep(0.02)
            with turn:
                under_way[0] -= 1
            self.send_response(200)
            self.end_headers()
            self.wfile.write(scores(1).encode())

        def log_message(self, *words: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    scorer = RemoteReward(url=url, health=False, micro_batch=1, concurrency=2, **QUICK).build(CPU)
    with ThreadPoolExecutor(3) as callers:
        found = list(callers.map(lambda _: scorer.score(IMAGES, PROMPTS).tolist(), range(3)))
    server.shutdown()
    server.server_close()
    assert found == [[0.5] * 7] * 3
    assert most[0] == 2


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://host", "http://", "http://h?q=1"])
def test_an_address_that_is_none_is_refused(url):
    with pytest.raises(ValueError, match=r"is no address of a server, such as 'http://127.0.0.1:8000'"):
        RemoteReward(url=url)


def test_a_server_is_a_lane_of_its_own():
    assert RemoteReward(url="http://one:8000/").lane == "one:8000"
    assert RemoteReward(url="http://one:8000/").url == "http://one:8000"


def test_what_is_sent_is_what_was_painted():
    with answering([(200, scores(2))]) as (url, asked):
        ask(url)
    assert asked[0][1] == pack(IMAGES[:2], PROMPTS[:2], "safetensors")
