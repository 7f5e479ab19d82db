"""What a user sees where the hub says no: a server on loopback answers as the hub does, to the real libraries."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

# what the hub answers, by the name of the repository: status, X-Error-Code, X-Error-Message
ANSWERS = {
    "gated": (403, "GatedRepo", "Access to this repository is restricted"),
    "absent": (401, "RepoNotFound", "Repository not found"),
    "hidden": (404, "RepoNotFound", "Repository not found"),
    "revised": (404, "RevisionNotFound", "Invalid rev id"),
    "token": (401, "", "Invalid credentials in Authorization header"),
    "bare": (404, "EntryNotFound", "Entry not found"),
    "down": (503, "", "try later"),
}
READER = """
import json, sys, time, torch
from aegpo.errors import AegpoError
from aegpo.models.sd3 import Sd3Spec
from aegpo.prompts.datasets import read_dataset
from aegpo.rewards.clip import ClipReward
from aegpo.rewards.hpsv2 import Hpsv2Reward
from aegpo.core.sections import DatasetPrompts

def told(call):
    try:
        call()
    except AegpoError as error:
        return str(error)
    return None

time.sleep = lambda seconds: None  # between the five attempts of the hub's client lie 23 seconds
CPU, found = torch.device("cpu"), {}
for name in sys.argv[1:]:
    path = f"org/{name}"
    found[f"model {name}"] = told(lambda: Sd3Spec(path=path, revision="v2" if name == "revised" else None).build(CPU))
    found[f"reward {name}"] = told(lambda: Hpsv2Reward(path=path).build(CPU))
    found[f"clip {name}"] = told(lambda: ClipReward(path=path).build(CPU))
    found[f"dataset {name}"] = told(lambda: read_dataset(DatasetPrompts(dataset=path)))
print(json.dumps(found))
"""


class Hub(BaseHTTPRequestHandler):
    """Says no to everything, in the hub's words."""

    def do_HEAD(self) -> None:
        name = next((part for part in self.path.replace("%2F", "/").split("/") if part in ANSWERS), "absent")
        status, code, message = ANSWERS[name]
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_POST = do_HEAD

    def log_message(self, format: str, *args: object) -> None:
        pass


def read(tmp_path, *names, **environment):
    """The messages by what was read."""
    variables = os.environ | {"HF_HOME": str(tmp_path), "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"} | environment
    variables.pop("HF_TOKEN", None)
    words = [sys.executable, "-c", READER, *names]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=variables)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def online(tmp_path_factory):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        found = read(tmp_path_factory.mktemp("hf"), *ANSWERS, HF_ENDPOINT=endpoint, HF_HUB_OFFLINE="0")
    finally:
        server.shutdown()
        server.server_close()
    return {what: None if message is None else message.replace(endpoint, "HUB") for what, message in found.items()}


LOG_IN = "log in with 'hf auth login' or set HF_TOKEN"
SAID = {
    "gated": "is gated: accept its terms at HUB/{page}org/gated, and " + LOG_IN,
    "absent": "is not there for you to read: is the name right? if HUB/{page}org/absent is private or gated, " + LOG_IN,
    "hidden": "is not there for you to read: is the name right? if HUB/{page}org/hidden is private or gated, " + LOG_IN,
    "token": "cannot be read with your token, which the hub does not accept: " + LOG_IN + " again",
}


@pytest.mark.parametrize("name", list(SAID))
@pytest.mark.parametrize("what", ["model", "reward", "clip", "dataset"])
def test_the_answer_of_the_hub_is_told_with_the_way_out(what, name, online):
    message = online[f"{what} {name}"]
    assert SAID[name].format(page="datasets/" if what == "dataset" else "") in message
    assert len(message.splitlines()) == 1
    assert f"org/{name}" in message


def test_a_revision_or_a_file_that_is_not_there_is_named(online):
    assert online["model revised"].startswith(
        "model 'sd3': hub id 'org/revised' has no revision 'v2'; name one of its br"
    )
    assert "'org/revised' has no revision 'main'" in online["reward revised"]
    assert "it has no revision 'main'" in online["dataset revised"]
    assert online["model bare"] == (
        "model 'sd3': hub id 'org/bare' has no model_index.json; a StableDiffusion3Pipeline was expected"
    )
    assert "'HPS_v2.1_compressed.pt' of 'org/bare'" in online["reward bare"]


def test_a_hub_that_is_down_is_no_fault_of_the_name(online):
    for what in ("model", "reward"):
        assert "is not in the cache, and the hub cannot be reached" in online[f"{what} down"]


@pytest.mark.slow
def test_offline_the_cache_is_named(tmp_path):
    found = read(tmp_path, "gated", HF_HUB_OFFLINE="1")
    for message in found.values():
        assert "is not in the cache, and HF_HUB_OFFLINE is set" in message
        assert len(message.splitlines()) == 1
