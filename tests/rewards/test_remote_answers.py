"""What a hostile server answers: bounded in time, bytes and depth, in one line of plain words, and its token kept."""

from __future__ import annotations

import gzip
import time
import tracemalloc

import pytest
from misbehaving import FAULTS, answer, misbehaving
from test_remote import IMAGES, PROMPTS, ask, scores

from aegpo.errors import AegpoError
from aegpo.rewards.remote import RemoteReward
from aegpo.rewards.servers import Server, is_loopback
from aegpo.rewards.wire import SAFETENSORS, pack

TOKEN = "s3cret-4711"
ENDLESS = ["slow loris", "slow headers", "endless body", "endless trailers", "endless and unmeasured", "never"]
NOBODY = "http://127.0.0.1:9"


@pytest.fixture
def told(monkeypatch):
    monkeypatch.setenv("AEGPO_TEST_TOKEN", TOKEN)
    with misbehaving() as server:
        yield server


def refusal(told, fault: str, **changes) -> str:
    url, behaviour = told
    behaviour.begin(fault)
    with pytest.raises(AegpoError) as caught:
        ask(url, **{"token_env": "AEGPO_TEST_TOKEN", "retries": 0, **changes})
    return caught.value.message


@pytest.mark.parametrize("fault", ENDLESS)
def test_the_whole_answer_has_to_come_in_time_however_slowly_it_comes(fault, told):
    begin = time.monotonic()
    message = refusal(told, fault, timeout=0.4)
    assert time.monotonic() - begin < 20  # the answer goes on for 25
    assert "could not be asked in 1 attempts: ReadTimeout: " in message


@pytest.mark.parametrize("fault", ["gzip bomb", "huge body", "a million lists", "bomb of a refusal"])
def test_no_answer_takes_more_memory_than_a_few_mebibytes(fault, told):
    tracemalloc.start()
    refusal(told, fault)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40 * 2**20  # of which the server in this process has ten


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("gzip bomb", "/score: the answer has more than 4194304 bytes; scores alone were expected"),
        ("bad gzip", "/score: the answer is no 'gzip', which it says it is packed with: "),
        ("unknown packing", "/score: the answer is packed with 'br', which was not asked for; "),
        ("deep json", "did not answer with JSON: '[[["),
        ("deep and closed json", "it is too deep; 64 lists and mappings inside one another at most"),
        ("huge int text", "did not answer with JSON: "),
        ("nan", "the server answered nan for prompt "),
        ("1e300", "the server answered 1e+300 for prompt "),
        ("big int", "the server answered 1000"),
        ("redirect", "status 307: ; redirects are not followed, put the address itself into 'url'"),
        ("what a terminal obeys", "refused: status 400: ?[2J error: all is well?"),
        ("401 echo", "refused: status 401: wrong: Bearer ***"),
        ("500 echo", "'Authorization': 'Bearer ***'"),
        ("200 echo", "the server answered {'scores': 'Bearer ***'}; "),
    ],
)
def test_an_answer_that_is_none_is_told_in_one_line_without_the_token(fault, words, told):
    message = refusal(told, fault)
    assert words in message
    assert message.isprintable()
    assert TOKEN not in message
    assert len(message) < 700


def test_an_answer_that_a_proxy_packed_is_read(told, monkeypatch):
    url, behaviour = told
    packed = gzip.compress(scores(2).encode())
    monkeypatch.setitem(FAULTS, "packed", lambda handler, _: handler.reply(200, packed, ("Content-Encoding", "gzip")))
    behaviour.begin("packed")
    assert ask(url).tolist() == [0.5, 0.5]


def test_connections_are_used_again_after_a_late_answer(told):
    url, behaviour = told
    refusal(told, "slow loris", timeout=0.3)
    behaviour.begin(None)
    assert len(ask(url, micro_batch=1)) == 2


@pytest.mark.parametrize("token", [TOKEN + "\n", " " + TOKEN, TOKEN + "\u00e9"])
def test_a_token_that_no_header_holds_is_refused_by_its_place_alone(token, monkeypatch):
    monkeypatch.setenv("AEGPO_TEST_TOKEN", token)
    with pytest.raises(AegpoError, match=r"'token_env' names 'AEGPO_TEST_TOKEN', whose character .* no") as caught:
        Server(RemoteReward(url=NOBODY, token_env="AEGPO_TEST_TOKEN"))
    assert TOKEN not in caught.value.message


@pytest.mark.parametrize("token_env", ["AEGPO_TEST_TOKEN", None])
def test_no_account_of_netrc_is_sent(token_env, told, monkeypatch, tmp_path):
    url, behaviour = told
    netrc = tmp_path / "netrc"
    netrc.write_text("default login someone password something\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    ask(url, token_env=token_env)
    assert behaviour.tokens == [None if token_env is None else f"Bearer {TOKEN}"]


def test_a_proxy_of_the_environment_is_for_other_machines_and_is_named_without_its_user(told, monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://user:hunter2@127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert len(ask(told[0])) == 2
    with pytest.raises(AegpoError, match=r"attempts through the proxy 'http://127.0.0.1:9', which the env") as caught:
        ask("http://rewards.invalid", retries=0)
    assert "hunter2" not in caught.value.message


def test_no_cookie_is_kept(told, monkeypatch):
    url, behaviour = told
    baked = [("Set-Cookie", f"cookie-{at}=x") for at in range(50)]
    monkeypatch.setitem(FAULTS, "cookies", lambda handler, found: handler.reply(200, answer(found), *baked))
    behaviour.begin("cookies")
    server = Server(RemoteReward(url=url))
    server.post("/score", pack(IMAGES[:1], PROMPTS[:1], "safetensors"), SAFETENSORS)
    assert not server._session.cookies


@pytest.mark.parametrize("changes", [{"timeout": 1e300}, {"timeout": float("inf")}, {"concurrency": 10**9}])
def test_numbers_that_no_clock_or_pool_can_bear_are_refused(changes):
    with pytest.raises(ValueError, match=r"less than or equal to|finite number"):
        RemoteReward(url=NOBODY, **changes)
    longest = RemoteReward(url=NOBODY, timeout=86_400, backoff=86_400, concurrency=1024, retries=0)
    with pytest.raises(AegpoError, match="could not be asked in 1 attempts"):
        Server(longest).get("/health")


def test_this_machine_is_known_by_its_names():
    near = ["http://127.0.0.1:1", "http://127.8.9.1", "https://[::1]:80/v1", "http://localhost", "http://a.localhost"]
    far = ["http://10.0.0.1", "http://host", "http://localhost.example.org", "http://[fe80::1]"]
    assert [is_loopback(url) for url in near + far] == [True] * len(near) + [False] * len(far)
