"""How long a reward on a server waits before it asks again, and when it does not."""

from __future__ import annotations

import time
from email.utils import formatdate
from itertools import pairwise

import pytest
from test_remote import answering, ask, scores

from aegpo.errors import AegpoError
from aegpo.rewards.remote import RemoteReward
from aegpo.rewards.servers import Server


def pauses(asked) -> list[float]:
    times = [moment for moment, _ in asked]
    return [later - earlier for earlier, later in pairwise(times)]


def test_a_server_that_names_seconds_is_asked_again_after_them():
    with answering([(503, "busy", ("Retry-After", "1")), (200, scores(2))]) as (url, asked):
        assert ask(url, backoff=0.01).tolist() == [0.5, 0.5]
    assert 0.9 < pauses(asked)[0] < 10


def test_a_server_that_names_a_date_is_asked_again_then():
    named, since = int(time.time()) + 2, time.time() - time.monotonic()  # a date has whole seconds
    answers = [(503, "busy", ("Retry-After", formatdate(named, usegmt=True))), (200, scores(2))]
    with answering(answers) as (url, asked):
        assert ask(url, backoff=0.01).tolist() == [0.5, 0.5]
    assert named - 0.1 < since + asked[1][0]
    assert pauses(asked)[0] < 10


def test_a_time_that_is_named_replaces_a_longer_pause():
    with answering([(429, "slow", ("Retry-After", "1")), (200, scores(2))]) as (url, asked):
        ask(url, backoff=30.0)
    assert pauses(asked)[0] < 15


@pytest.mark.parametrize("named", ["0", "soon", "-3", "9" * 5000, "Mon, 01 Jan 99999999999 00:00:00 GMT"])
def test_a_time_that_is_none_leaves_the_pause_as_it_is(named):
    with answering([(503, "busy", ("Retry-After", named)), (200, scores(2))]) as (url, asked):
        assert ask(url, backoff=0.2).tolist() == [0.5, 0.5]
    assert 0.2 <= pauses(asked)[0] < 10


@pytest.mark.parametrize("named", ["21", "3600"])
def test_a_time_that_is_longer_than_an_answer_may_take_is_an_error(named):
    message = (
        rf"'remote': .*/score wants to be asked again only after {named} s, but 'timeout' is 20 s: status 503: busy"
    )
    with answering([(503, "busy", ("Retry-After", named))]) as (url, asked), pytest.raises(AegpoError, match=message):
        ask(url)
    assert len(asked) == 1


def test_the_last_attempt_ends_it_whatever_time_is_named():
    with (
        answering([(503, "busy", ("Retry-After", "3600"))]) as (url, _),
        pytest.raises(AegpoError, match="could not be asked in 1 attempts: status 503: busy"),
    ):
        ask(url, retries=0)


@pytest.mark.slow
def test_thousands_of_attempts_are_possible():
    with answering([(503, "busy")]) as (url, asked), pytest.raises(AegpoError, match="in 1501 attempts"):
        ask(url, retries=1500, backoff=0)
    assert len(asked) == 1501


def test_an_answer_that_breaks_off_is_asked_for_again():
    whole = scores(2)
    broken = (200, whole[:5], ("Content-Length", str(len(whole))))
    with answering([broken, (200, whole)]) as (url, asked):
        assert ask(url).tolist() == [0.5, 0.5]
    assert len(asked) == 2


def test_a_token_does_not_follow_a_redirect(monkeypatch):
    monkeypatch.setenv("AEGPO_TEST_TOKEN", "s3cret")
    with (
        answering([(200, scores(2))]) as (elsewhere, told),
        answering([(307, "", ("Location", elsewhere))]) as (url, _),
    ):
        server = Server(RemoteReward(url=url, token_env="AEGPO_TEST_TOKEN", health=False))
        with pytest.raises(AegpoError, match="refused: status 307"):
            server.post("/score", b"", "application/json")
        assert not told
