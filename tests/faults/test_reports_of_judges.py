"""What people reported against programs that ask models and servers for a grade, tried on whole runs.

Judges: eren23/openflipbook PR 142, OpenAgentHQ/openagent-eval 74. Accounts: psf/requests 3929, python-gitlab 2425,
AmanSK5/shadow-ai-guard 103.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from served import serving

NOBODY = "http://127.0.0.1:9"
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")


@contextmanager
def judging(answer: str | None, reason: str | None) -> Iterator[tuple[str, list[bytes]]]:
    """A chat endpoint that always says the same; its address, and what it was asked."""
    asked = []

    class Judge(BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append(self.rfile.read(int(self.headers.get("Content-Length", 0))))
            message = {"role": "assistant", "content": answer}
            body = json.dumps({"choices": [{"finish_reason": reason, "message": message}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *words):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", asked
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def judged(warm, write_experiment, tmp_path):
    """A run of one step whose judge says this: how it ended, and the rewards of its steps."""

    def run(answer, reason="stop", kind="vlm-judge", **changes):
        with judging(answer, reason) as (url, asked):
            judge = {"kind": kind, "url": url, "model": "m", "retries": 0, "attempts": 1} | changes
            path = write_experiment(rewards=[judge], training_steps=1)
            ended = warm(["run", path, "--out", "out", "--no-report"], tmp_path)
        texts = [found.read_text() for found in (tmp_path / "out").rglob("metrics.jsonl")]
        rows = [json.loads(line) for text in texts for line in text.splitlines()]
        return ended, [row["metrics"]["reward"] for row in rows], len(asked)

    return run


def test_judge_cut_off(judged):
    ended, rewards, _ = judged("The prompt asks for 3 red circles on green. I can count 2", "length")
    assert ended.code == 2
    assert "reward 'vlm-judge': 'm' gave no answer that can be read in 1 attempts" in ended.error
    assert "'finish_reason' 'length'; raise 'max_tokens'" in ended.error
    assert not ended.traceback
    assert not rewards


def test_judge_with_decimal_comma(judged):
    ended, rewards, _ = judged("Good.\n7,5")
    assert (ended.code, rewards) == (0, [7.5]), ended.out


def test_judge_says_the_scale_after_the_grade(judged):
    ended, rewards, _ = judged("Grade: 8 (on a scale from 0 to 10)")
    assert (ended.code, rewards) == (0, [8.0]), ended.out


@pytest.mark.parametrize("reason", ["content_filter", None])
def test_judge_whose_answer_may_not_be_whole(judged, reason):
    ended, rewards, _ = judged("8", reason)
    assert ended.code == 2
    assert "'finish_reason'" in ended.error
    assert not rewards


def test_judge_of_another_scale_is_asked_as_often_as_attempts_say(judged):
    ended, rewards, asked = judged("4/5", attempts=2, concurrency=1)
    assert (ended.code, rewards) == (2, [])
    assert asked in (2, 4)  # the next image may be under way before the failure of the first is seen
    assert "at last '4/5'; change 'question'" in ended.error


def test_preference_that_begins_with_an_article(judged):
    ended, rewards, _ = judged("A red circle is in both of them", kind="vlm-preference")
    assert ended.code == 2
    assert "'vlm-preference': 'm' gave no answer that can be read" in ended.error
    assert not rewards


def far(port: int, **changes: object) -> dict[str, object]:
    return {"kind": "remote", "url": f"http://127.0.0.1:{port}", "token_env": "TOK", "retries": 0, **changes}


def test_netrc_and_a_token(warm, write_experiment, tmp_path):
    netrc = tmp_path / "netrc"
    netrc.write_text("default login someone password something\n")
    netrc.chmod(0o600)
    with serving("--port", 0, "--token-env", "TOK", TOK="secret") as server:
        path = write_experiment(rewards=[far(server.port)], training_steps=1)
        environment = {"NETRC": str(netrc), "TOK": "secret"}
        ended = warm(["run", path, "--out", "out", "--no-report"], tmp_path, environment=environment)
    assert ended.code == 0, ended.out


def test_a_proxy_and_a_server_on_this_machine(warm, write_experiment, tmp_path):
    with serving("--port", 0, "--token-env", "TOK", TOK="secret") as server:
        path = write_experiment(rewards=[far(server.port)], training_steps=1)
        environment = dict.fromkeys(PROXIES, NOBODY) | {"TOK": "secret", "no_proxy": None, "NO_PROXY": None}
        ended = warm(["run", path, "--out", "out", "--no-report"], tmp_path, environment=environment)
    assert ended.code == 0, ended.out


def test_a_proxy_that_is_away_is_named_without_its_password(warm, write_experiment, tmp_path):
    proxies = dict.fromkeys(PROXIES, "http://user:hunter2@127.0.0.1:9") | {"no_proxy": None, "NO_PROXY": None}
    far_away = {"kind": "remote", "url": "http://rewards.invalid:8000", "retries": 0, "timeout": 5}
    ended = warm(["run", write_experiment(rewards=[far_away]), "--out", "out"], tmp_path, environment=proxies)
    assert ended.code == 2
    assert "through the proxy 'http://127.0.0.1:9', which the environment names" in ended.error
    assert "hunter2" not in ended.out


def test_token_with_an_umlaut():
    with serving("--port", 0, "--token-env", "TOK", TOK="secret") as server:
        head = b"GET /health HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer caf\xe9\r\nConnection: close\r\n\r\n"
        answer = server.say(head)
        assert b" 401 " in answer.split(b"\n")[0]
        assert "Traceback" not in server.logged


def test_a_server_whose_own_token_has_an_umlaut_does_not_start(warm, tmp_path):
    words = ["serve-reward", "palette", "--port", "0", "--token-env", "TOK"]
    ended = warm(words, tmp_path, environment={"TOK": "caf\u00e9"})
    assert ended.code == 2
    assert "--token-env names 'TOK', whose character 4 of 4 no token may have" in ended.error
    assert "caf" not in ended.out
