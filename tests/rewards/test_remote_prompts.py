"""What servers are told of prompts: their metadata, and in which protocol; real servers, and some of other editions."""

from __future__ import annotations

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import pytest
import requests
import torch
from image_distance import ImageDistance
from test_remote import CPU, IMAGES, PROMPTS, QUICK, answering, ask, served
from test_wire import of_edition_one
from video_world import Light, Motion, Redness
from wanted_brightness import WantedBrightness

from aegpo.commands.serve_reward import Scoring, ServeRequest, make_app, reward_spec
from aegpo.core.foreign import watching_for_the_user
from aegpo.core.records import Prompt
from aegpo.errors import AegpoError
from aegpo.plugin.manager import load_registries, plugin_manager
from aegpo.rewards.remote import RemoteReward
from aegpo.rewards.wire import CONTENT_TYPES, pack, png
from aegpo.train.scoring import build_scorers, score

uvicorn = pytest.importorskip("uvicorn", reason='pip install "aegpo[serve]"')
VIDEOS = torch.rand((2, 3, 3, 8, 8), generator=torch.Generator().manual_seed(0))
PLUGINS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wanted():
    with served("wanted-brightness", "--plugin", str(PLUGINS / "wanted_brightness.py"), "--port", "0") as url:
        yield url


@pytest.fixture(scope="module")
def near():
    with served("image-distance", "--plugin", str(PLUGINS / "image_distance.py"), "--port", "0") as url:
        yield url


@pytest.fixture(scope="module")
def narrow():
    with served("palette", "--port", "0", "--max-bytes", "30000") as url:
        yield url


@pytest.mark.parametrize("body", ["safetensors", "json"])
def test_a_served_reward_reads_the_metadata_of_prompts(wanted, body):
    prompts = [Prompt(each.index, each.text, {"brightness": 0.1 * each.index, "of": [1, None]}) for each in PROMPTS]
    images = (IMAGES * 255).round() / 255
    found = RemoteReward(url=wanted, body=body, micro_batch=2, **QUICK).build(CPU).score(images, prompts)
    assert torch.equal(found, WantedBrightness().score(images, prompts))


def test_a_prompt_without_what_the_served_reward_needs_is_refused_and_not_sent_again(wanted):
    scorer = RemoteReward(url=wanted, backoff=20.0, timeout=20.0).build(CPU)
    begin = time.monotonic()
    with pytest.raises(AegpoError, match=r"refused: status 422: prompt '.*': reward 'wanted-brightness' needs"):
        scorer.score(IMAGES, PROMPTS)
    assert time.monotonic() - begin < 10


@pytest.mark.parametrize("body", ["safetensors", "json"])
def test_a_served_reward_opens_the_images_of_prompts(near, body, tmp_path):
    images = (IMAGES * 255).round() / 255
    prompts = []
    for number in range(len(PROMPTS)):
        path = tmp_path / f"{number}.png"
        path.write_bytes(png(images[(number + 1) % len(images)]))
        prompts.append(Prompt(0, "the same text", {}, (path,)))
    found = RemoteReward(url=near, body=body, micro_batch=2, **QUICK).build(CPU).score(images, prompts)
    assert torch.equal(found, ImageDistance().score(images, prompts))
    assert len(set(found.tolist())) == len(found)
    with pytest.raises(AegpoError, match=r"status 422: prompt '.*': reward 'image-distance' needs an image, but this"):
        RemoteReward(url=near, body=body, **QUICK).build(CPU).score(images, PROMPTS)


def test_images_of_prompts_are_gone_from_the_server_once_they_were_compared_with(tmp_path):
    class Noting(ImageDistance):
        seen: ClassVar[list[Path]] = []

        def score(self, images, prompts):
            self.seen.extend(path for prompt in prompts for path in prompt.images)
            return super().score(images, prompts)

    path = tmp_path / "a.png"
    path.write_bytes(png(IMAGES[0]))
    body = pack(IMAGES[:2], [Prompt(0, "a", {}, (path,))] * 2, "safetensors")
    status, _ = Scoring(Noting(), Noting()).answer(body, CONTENT_TYPES["safetensors"])
    assert status == 200
    assert len(set(Noting.seen)) == 1
    assert not Noting.seen[0].parent.exists()
    assert path.exists()


def test_metadata_counts_in_the_size_of_a_request(narrow):
    long = [Prompt(0, PROMPTS[0].text, {"story": "x" * 30_000})]
    with pytest.raises(AegpoError, match="status 413: the body is larger than 30000 bytes"):
        RemoteReward(url=narrow, **QUICK).build(CPU).score(IMAGES[:1], long)


def test_images_of_prompts_count_in_the_size_of_a_request(narrow, tmp_path):
    (tmp_path / "a.png").write_bytes(bytes(30_000))
    large = [Prompt(0, PROMPTS[0].text, {}, (tmp_path / "a.png",))]
    with pytest.raises(AegpoError, match="status 413: the body is larger than 30000 bytes"):
        RemoteReward(url=narrow, **QUICK).build(CPU).score(IMAGES[:1], large)


@pytest.mark.parametrize("kind", ["safetensors", "json"])
def test_a_run_of_aegpo_0_1_is_told_that_the_server_is_newer(narrow, kind):
    texts = [each.text for each in PROMPTS[:2]]
    body = of_edition_one(IMAGES[:2], texts, kind)
    headers = {"Content-Type": CONTENT_TYPES[kind]}
    answer = requests.post(f"{narrow}/score", data=body, headers=headers, timeout=20)
    assert answer.status_code == 400  # which a run of 0.1 does not send again, and shows with its reason
    assert answer.json()["detail"] == (
        "the request is of protocol 1 (aegpo 0.1, whose prompts were strings), this server takes 3: use the same "
        "version of aegpo for both"
    )


OLDER = (
    r"reward 'remote': the server at http://\S+ takes protocol 1 \(aegpo 0.1, whose prompts were strings\), "
    "this run sends 3: use the same version of aegpo for both"
)


@pytest.mark.parametrize(
    ("health", "message"),
    [
        ('{"status": "ok", "reward": {"kind": "palette"}}', OLDER),  # what a server of 0.1 answers
        ('"ok"', OLDER),
        ('{"protocol": 2}', "takes protocol 2, this run sends 3: use the same version"),  # prompts without images
        ('{"protocol": 4}', "takes protocol 4, this run sends 3: use the same version"),
    ],
)
def test_a_server_of_another_protocol_is_told_before_the_run_begins(health, message):
    with answering([(200, health)]) as (url, _), pytest.raises(AegpoError, match=message):
        RemoteReward(url=url, **QUICK).build(CPU)


def test_a_server_of_aegpo_0_1_that_was_not_asked_is_told_by_its_first_answer():
    refusal = json.dumps({"detail": "'prompts' is no list of strings"})
    with answering([(400, refusal)]) as (url, got), pytest.raises(AegpoError, match=f"{OLDER}$"):
        ask(url)
    assert len(got) == 1


def scoring(spec):
    return Scoring(spec, spec.build(CPU))


def test_a_served_reward_is_asked_about_what_it_reads():
    videos = pack(VIDEOS, PROMPTS[:2], "safetensors")
    images = pack(IMAGES[:2], PROMPTS[:2], "safetensors")
    kind = CONTENT_TYPES["safetensors"]
    assert scoring(Motion()).answer(videos, kind) == (200, {"scores": Motion().score(VIDEOS, PROMPTS[:2]).tolist()})
    assert [scoring(Light()).answer(body, kind)[0] for body in (images, videos)] == [200, 200]
    status, content = scoring(Redness()).answer(videos, kind)
    assert status == 422
    assert content["detail"] == (
        "reward 'redness' reads images, but was sent videos; name 'frames: mean', 'first' or 'min' in the experiment, "
        "at its reward 'remote', which then sends frames one by one"
    )
    status, content = scoring(Motion()).answer(images, kind)
    assert status == 422
    assert content["detail"] == (
        "reward 'motion' reads videos, but was sent images; leave 'frames' out, or serve another reward"
    )


@pytest.mark.parametrize("body", ["safetensors", "json"])
def test_videos_are_scored_by_a_server_as_in_the_run(body):
    videos = (VIDEOS * 255).round() / 255
    for spec, frames in ((Motion(), None), (Redness(), "mean"), (Redness(), "first")):
        app = make_app(scoring(spec), None, 2**20)
        with in_a_thread(app) as url:
            far = RemoteReward(url=url, body=body, micro_batch=1, frames=frames, **QUICK)
            found = score(build_scorers([far], CPU), videos, PROMPTS[:2])["remote"]
        near = spec.model_copy(update={"frames": frames})
        assert torch.equal(found, score(build_scorers([near], CPU), videos, PROMPTS[:2])[spec.kind])


def test_a_server_is_not_told_what_becomes_of_frames():
    registry = load_registries(plugin_manager(["video_world"])).rewards
    with pytest.raises(AegpoError, match=r"--set frames=mean: a server scores what it is sent; name 'frames' in the"):
        reward_spec(ServeRequest("redness", ("frames=mean",)), registry)


@contextmanager
def in_a_thread(app):
    """An app behind an address, in this process."""
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)


def test_a_served_reward_of_the_first_edition_is_told_what_to_write_now():
    class Old(WantedBrightness):
        needs_metadata: ClassVar[tuple[str, ...]] = ()

        def score(self, images, prompts):
            return torch.tensor([float(len(prompt.split())) for prompt in prompts])

    scoring = Scoring(Old(name="old"), Old(name="old"))
    status, content = scoring.answer(pack(IMAGES[:2], PROMPTS[:2], "safetensors"), CONTENT_TYPES["safetensors"])
    assert status == 500
    assert content["detail"] == (
        "reward 'old' failed with AttributeError: 'Prompt' object has no attribute 'split'; it was written for aegpo "
        "0.1, whose prompts were strings: use prompt.text"
    )


@pytest.mark.parametrize("error", [SystemExit(0), KeyboardInterrupt()], ids=["exit", "interrupt"])
def test_a_served_reward_that_exits_fails_and_the_server_goes_on(error):
    class Exiting(WantedBrightness):
        needs_metadata: ClassVar[tuple[str, ...]] = ()

        def score(self, images, prompts):
            raise error

    scoring = Scoring(Exiting(name="exiting"), Exiting(name="exiting"))
    body = pack(IMAGES[:2], PROMPTS[:2], "safetensors")
    with ThreadPoolExecutor(1) as pool, watching_for_the_user():  # as the server calls it
        status, content = pool.submit(scoring.answer, body, CONTENT_TYPES["safetensors"]).result()
    assert status == 500
    assert content["detail"].startswith(f"reward 'exiting' failed with {type(error).__name__}")
