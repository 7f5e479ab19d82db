"""The vision-language rewards against a real endpoint: a server that looks at the pictures it is sent."""

from __future__ import annotations

import base64
import io
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from worlds import asked

from aegpo.core.records import Prompt
from aegpo.errors import AegpoError
from aegpo.rewards.vlm import VlmJudgeReward, VlmPreferenceReward
from aegpo.testing import check_reward

CPU = torch.device("cpu")
PROMPTS = ["a {red} cube", "a cat", "a dog"]


def brightness(part) -> float:
    data = base64.b64decode(part["image_url"]["url"].removeprefix("data:image/png;base64,"))
    return float(np.asarray(Image.open(io.BytesIO(data))).mean() / 255)


@contextmanager
def endpoint(say):
    """Answers each chat with what `say` makes of it; yields its address and the requests it got."""
    got = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            got.append((self.path, self.headers.get("Authorization"), request))
            said = say(request["messages"])
            answer, reason = said if isinstance(said, tuple) else (said, "stop")
            message = {"role": "assistant", "content": answer}
            content = {"choices": [{"finish_reason": reason, "message": message}]}
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

        def log_message(self, *words):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", got
    finally:
        server.shutdown()
        server.server_close()


def grade(messages) -> str:
    return f"It is 1 of 2 cubes, {PROMPTS[0]}.\n{10 * brightness(messages[0]['content'][0]):.3f}"


def prefer(messages) -> str:
    """The brighter one; the first of two that are alike, as models tend to."""
    one, other = (brightness(part) for part in messages[0]["content"][:2])
    return f"A is {one}, B is {other}.\n{'A' if one >= other else 'B'}"


def judge(url: str, **changes) -> VlmJudgeReward:
    return VlmJudgeReward(**{"url": url, "model": "eye", "backoff": 0.05, "retries": 1, **changes})


def grey(*levels: float) -> torch.Tensor:
    return torch.tensor(levels)[:, None, None, None].expand(-1, 3, 6, 6)


def test_the_judge_conforms():
    with endpoint(grade) as (url, _):
        check_reward(judge(url), PROMPTS)


def test_grades_are_the_last_number_of_each_answer():
    with endpoint(grade) as (url, got):
        scores = judge(url).build(CPU).score(grey(0.0, 0.2, 1.0), asked(PROMPTS))
    assert scores.tolist() == pytest.approx([0, 2, 10])
    path, _, request = got[0]
    assert path == "/v1/chat/completions"
    assert (request["model"], request["temperature"], request["max_tokens"]) == ("eye", 0, 512)
    questions = {request["messages"][0]["content"][1]["text"] for _, _, request in got}
    assert any("the following? a {red} cube\n" in question for question in questions)


def test_the_token_goes_along(monkeypatch):
    monkeypatch.setenv("EYE_TOKEN", "s3cret")
    with endpoint(grade) as (url, got):
        judge(url, token_env="EYE_TOKEN").build(CPU).score(grey(0.5), asked(["a cat"]))
    assert got[0][1] == "Bearer s3cret"


def test_an_answer_without_a_grade_is_asked_for_again_with_a_reminder():
    answers = iter(["I like it.", "12", "Well: 7.5"])
    with endpoint(lambda messages: next(answers)) as (url, got):
        assert judge(url).build(CPU).score(grey(0.5), asked(["a cat"])).tolist() == [7.5]
    roles = [message["role"] for message in got[-1][2]["messages"]]
    assert roles == ["user", "assistant", "user", "assistant", "user"]
    assert got[-1][2]["messages"][-1]["content"] == "Answer with a number from 0 to 10 alone."


@pytest.mark.parametrize(("answer", "shown"), [("no idea", "'no idea'"), ("11", "'11'"), (None, "''"), ("-1", "'-1'")])
def test_a_model_that_never_grades_is_an_error_and_not_a_score(answer, shown):
    with endpoint(lambda messages: answer) as (url, got):
        message = f"reward 'vlm-judge': 'eye' gave no answer that can be read in 2 attempts, at last {shown}; change"
        with pytest.raises(AegpoError, match=message):
            judge(url, attempts=2).build(CPU).score(grey(0.5), asked(["a cat"]))
    assert len(got) == 2


@pytest.mark.parametrize(
    ("reason", "way"),
    [("length", "raise 'max_tokens', change"), ("content_filter", "change"), (None, "change")],
)
def test_an_answer_that_may_have_been_cut_off_is_no_verdict_whatever_it_says(reason, way):
    with endpoint(lambda messages: ("It is worth\n7", reason)) as (url, got):
        message = f"in 2 attempts, at last '7', with 'finish_reason' {reason!r}; {way} 'question', or take"
        with pytest.raises(AegpoError, match=message):
            judge(url, attempts=2).build(CPU).score(grey(0.5), asked(["a cat"]))
        assert len(got) == 2
        answers = iter([("The better one is A", reason), "B", "A"])
    with endpoint(lambda messages: next(answers)) as (url, _):
        scorer = preference(url).model_copy(update={"concurrency": 1}).build(CPU)
        assert scorer.score(grey(0.9, 0.1), asked(["a cat"] * 2)).tolist() == [0.0, 1.0]


def test_an_endpoint_of_another_kind_is_an_error():
    from test_remote import answering

    with (
        answering([(200, '{"scores": [1]}')]) as (url, _),
        pytest.raises(AegpoError, match=r'the endpoint answered {"scores": \[1\]}, no chat completion'),
    ):
        judge(url).build(CPU).score(grey(0.5), asked(["a cat"]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"question": "how good?"}, r"has no {prompt}, which stands for the prompt"),
        ({"lowest": 5.0, "highest": 5.0}, "grades from 5 to 5; 'lowest' must be below 'highest'"),
        ({"model": ""}, "at least 1 character"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        judge("http://127.0.0.1:9", **changes)


def preference(url: str) -> VlmPreferenceReward:
    return VlmPreferenceReward(url=url, model="eye", backoff=0.05, retries=1)


def test_preference_conforms():
    with endpoint(prefer) as (url, _):
        check_reward(preference(url), PROMPTS)


def test_preferences_are_shares_of_wins_inside_the_group():
    prompts = ["a cat", "a dog", "a cat", "a cat", "a dog"]
    with endpoint(prefer) as (url, got):
        scores = preference(url).build(CPU).score(grey(0.9, 0.3, 0.1, 0.5, 0.3), asked(prompts))
    assert scores.tolist() == [1.0, 0.5, 0.0, 0.5, 0.5]  # equal dogs: the first wins in both orders, so half
    assert len(got) == 3 * 2 + 2


def test_prompts_of_one_text_and_different_images_are_not_compared_with_one_another():
    dark, bright = (Prompt(0, "redder", {}, (Path(f"{name}.png"),)) for name in ("dark", "bright"))
    with endpoint(prefer) as (url, got):
        scores = preference(url).build(CPU).score(grey(0.1, 0.3, 0.9, 0.7), [dark, dark, bright, bright])
        assert scores.tolist() == [0.0, 1.0, 1.0, 0.0]
        assert len(got) == 4
        with pytest.raises(AegpoError, match="prompt 'redder' has one image"):
            preference(url).build(CPU).score(grey(0.1, 0.3, 0.9), [dark, dark, bright])


def test_a_tie_counts_half():
    with endpoint(lambda messages: "TIE") as (url, _):
        assert preference(url).build(CPU).score(grey(0.9, 0.1), asked(["a cat"] * 2)).tolist() == [0.5, 0.5]


def test_one_image_alone_cannot_be_compared():
    with pytest.raises(
        AegpoError, match="reward 'vlm-preference': prompt 'a cat' has one image; a comparison needs two"
    ):
        preference("http://127.0.0.1:9").build(CPU).score(grey(0.9), asked(["a cat"]))
