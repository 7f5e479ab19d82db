"""`aegpo watch` against the folder of a real run: over HTTP, in a browser, and from the command line."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest
import requests
import uvicorn
from command_line import aegpo, start
from PIL import Image

from aegpo.commands.listening import address, listen
from aegpo.commands.watch import make_app
from aegpo.report.watch.folder import Watched

SPEC = """
name: small
training_steps: 4
seeds: [0, 1]
model: {{kind: shapes, weights: {weights}}}
prompts: {{train_count: 2, evaluation_count: 4}}
rollouts: {{prompts_per_step: 1, rollouts_per_step: 2, denoising_steps: 2}}
rewards: [palette]
allocator: uniform
selector: uniform
tree: independent
sampler: flow-sde
advantage: group
objective: clipped
evaluation: {{every: 2, images: 4, rewards: [scene]}}
trackers: []
"""
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PATIENCE = 60  # seconds


@contextmanager
def served(folder, on_progress=None):
    """The page of a folder; `on_progress` is called each time progress is asked for."""
    app = make_app(Watched(folder))
    if on_progress is not None:

        @app.middleware("http")
        async def told(request, call_next):
            if request.url.path == "/progress":
                on_progress()
            return await call_next(request)

    socket = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off", ws="none"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]})
    thread.start()
    try:
        yield address(socket)
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def url(arm):
    with served(arm.parent) as address:
        yield address


def get(url, **options):
    return requests.get(url, timeout=PATIENCE, **options)


def test_the_page_holds_everything_and_takes_nothing_from_elsewhere(url):
    answer = get(f"{url}/")
    assert answer.status_code == 200
    assert "2 finished" in answer.text
    assert answer.text.count("<svg ") == 2
    assert "palette (trained)" in answer.text
    assert "scene (guard: scored, never optimised)" in answer.text
    links = re.findall(r'(?:src|href)="([^"#][^"]*)"', answer.text)
    assert {link for link in links if not link.startswith("images/main/")} == {"watch.js"}
    policy = answer.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; ")
    assert "http" not in policy
    assert "<script>" not in answer.text


def test_the_script_is_served_as_one(url):
    answer = get(f"{url}/watch.js")
    assert answer.headers["Content-Type"].startswith("text/javascript")
    assert "http" not in answer.text


def test_progress_says_what_version_the_results_are_of(url):
    told = get(f"{url}/progress").json()
    assert "4 / 4" in told["html"]
    assert told["version"] == get(f"{url}/progress").json()["version"]
    assert f'data-version="{told["version"]}"' in get(f"{url}/").text
    assert get(f"{url}/results").text.count("<svg ") == 2


def test_images_are_those_of_the_run(url, arm):
    answer = get(f"{url}/images/main/1/4")
    assert answer.headers["Content-Type"] == "image/png"
    assert answer.content == (arm / "seed-1" / "images" / "step-000004.png").read_bytes()
    for path in ("main/1/3", "main/2/4", "%2e%2e/1/4", "..%2fsmall%2fmain/1/4"):
        assert get(f"{url}/images/{path}").status_code == 404
    assert requests.post(f"{url}/progress", timeout=PATIENCE).status_code == 405


def test_a_page_elsewhere_whose_name_leads_here_is_told_nothing(url):
    assert get(f"{url}/progress", headers={"Host": "elsewhere.example"}).status_code == 400


# --- in a browser ----------------------------------------------------------------------------------------------------


def browser(*options: str) -> str:
    command = [CHROMIUM, "--headless", "--no-sandbox", "--hide-scrollbars", "--disable-gpu", *options]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=2 * PATIENCE).stdout


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_fits_a_window_and_a_phone(url, tmp_path, width):
    picture = tmp_path / f"watch-{width}.png"
    browser(f"--screenshot={picture}", f"--window-size={width},2600", "--virtual-time-budget=5000", f"{url}/")
    pixels = np.asarray(Image.open(picture).convert("RGB")).astype(int)
    assert pixels.shape[1] == width
    margin = np.concatenate([pixels[:, :12], pixels[:, -12:]], axis=1)
    assert np.abs(margin - pixels[0, 0]).max() < 8  # nothing runs out of the page at either side
    inked = np.abs(pixels - pixels[0, 0]).max(axis=2) > 40
    assert inked.any(axis=1).sum() > 900  # curves, tables and images are there
    assert inked[:, width // 2 :].any()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")
def test_an_evaluation_that_comes_is_shown_without_the_reader_doing_anything(arm, tmp_path):
    folder = tmp_path / "small"
    shutil.copytree(arm.parent, folder)
    run = folder / "main" / "seed-0"
    whole = {name: (run / name).read_bytes() for name in ("evaluations.jsonl", "metrics.jsonl", "timing.jsonl")}
    shutil.rmtree(folder / "main" / "seed-1")
    shutil.rmtree(run / "checkpoints")
    (run / "finished.json").rename(tmp_path / "finished.json")
    for name, content in whole.items():
        (run / name).write_bytes(b"".join(content.splitlines(keepends=True)[:1]))
    asked = []

    def goes_on():
        asked.append(None)
        if len(asked) == 2:  # once the page is there
            for name, content in whole.items():
                (run / name).write_bytes(content)
            shutil.copy(tmp_path / "finished.json", run)

    with served(folder, goes_on) as url:
        before = get(f"{url}/").text
        dom = browser("--virtual-time-budget=30000", "--dump-dom", f"{url}/")
    assert "finished" not in before.partition("<main")[2].partition("</table>")[0]
    progress = dom.partition("<main")[2].partition("</table>")[0]
    assert "4 / 4" in progress
    assert "main</td><td>4</td>" in dom.partition("Newest evaluation")[2]
    assert 'id="lost" class="lost" role="status" hidden=""' in dom
    assert len(asked) > 2


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")
def test_a_page_whose_command_has_ended_says_so(arm, tmp_path):
    state = []

    def breaks():
        state.append(None)
        raise RuntimeError("the server is gone")

    with served(arm.parent, breaks) as url:
        dom = browser("--virtual-time-budget=8000", "--dump-dom", f"{url}/")
    assert state
    assert 'id="lost" class="lost" role="status">' in dom


# --- from the command line -------------------------------------------------------------------------------------------


def test_the_command_prints_its_address_and_ctrl_c_ends_it_quietly(arm):
    child = start("watch", str(arm.parent), "--port", "0", stderr=subprocess.STDOUT)
    line = child.stdout.readline()
    url = re.search(r"http://127\.0\.0\.1:\d+", line)[0]
    assert line == f"watching {arm.parent} at {url}  (Ctrl-C ends)\n"
    until = time.monotonic() + PATIENCE
    while True:
        try:
            assert json.loads(get(f"{url}/progress").text)["version"]
            break
        except requests.ConnectionError:
            assert time.monotonic() < until
            time.sleep(0.1)
    child.send_signal(signal.SIGINT)
    assert child.wait(PATIENCE) == 0
    assert child.stdout.read() == ""


def test_what_cannot_be_watched_is_an_error_of_one_line(tmp_path):
    done = aegpo("watch", str(tmp_path))
    assert (done.code, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {tmp_path} is no experiment's folder: it has no order.json")
    assert done.stderr.count("\n") == 1


def test_a_port_that_is_taken_is_an_error_of_one_line(arm):
    with listen("127.0.0.1", 0) as taken:
        port = str(taken.getsockname()[1])
        done = aegpo("watch", str(arm.parent), "--port", port)
    assert done.code == 2
    assert done.stderr.startswith(f"error: 127.0.0.1:{port} cannot be served at: ")


def test_without_the_libraries_the_error_says_how_to_install_them(arm, monkeypatch):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    done = aegpo("watch", str(arm.parent), "--port", "0")
    assert done.code == 2
    assert done.stderr == 'error: watch needs fastapi; run  pip install "aegpo[serve]"\n'
