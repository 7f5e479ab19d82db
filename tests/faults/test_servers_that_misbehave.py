"""A run against a reward server that misbehaves: it ends with exit code 2, names the reward, and can go on."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from command_line import start
from misbehaving import FAULTS, OF_HEALTH, Behaviour, misbehaving
from warm import Ended

SECRET = "S3CR3T-4711-do-not-show"
FIRST = 6  # questions that are answered before the fault, so that there is something to save
LONGEST = 60  # seconds of the clock, with 'timeout' 2 and 'retries' 2
MORE_MEMORY = 300_000_000  # bytes that a fault may cost beside an undisturbed run
TOKENS = {
    "newline at the end": SECRET + "\n",
    "carriage return": SECRET + "\r",
    "unicode": SECRET + "\u2192",
    "space in front": " " + SECRET,
    "nul-like": SECRET + "\x01",
    "latin-1": SECRET + "\u00e9",
}
URLS = [
    "http://user:pass@127.0.0.1:1",
    "http://tok@127.0.0.1:1",
    "http://127.0.0.1:1/?token=abc",
    "http://127.0.0.1:1/#token",
    "file:///etc/passwd",
    "ftp://x",
    "http://",
    "http://[::1",
    "http://127.0.0.1:99999",
    "http://127.0.0.1:x",
    "http:// a",
    "http://127.0.0.1:1/a b",
    "gopher://127.0.0.1",
]


@pytest.fixture(scope="module")
def told() -> Iterator[tuple[str, Behaviour]]:
    with misbehaving() as server:
        yield server


def far(url: str, **changes: object) -> dict[str, object]:
    quick = {"timeout": 2, "retries": 2, "backoff": 0.1, "micro_batch": 4}
    return {"kind": "remote", "name": "far", "url": url, "token_env": "TOK", **quick, **changes}


@dataclass
class Runs:
    """Runs of one experiment, each in a folder of its own."""

    warm: object
    experiment: Path
    behaviour: Behaviour

    def __call__(self, out: str, token: str | None = SECRET, seconds: float = 45) -> Ended:
        words = ["run", self.experiment, "--out", out, "--no-report"]
        folder, environment = self.experiment.parent, {"TOK": token}
        return self.warm(words, folder, seconds=seconds, memory=14e9, environment=environment)

    def records(self, out: str) -> list[str]:
        folder = self.experiment.parent / out / "tiny" / "main" / "seed-0"
        names = ("metrics.jsonl", "evaluations.jsonl")
        return [hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names]

    def written(self, out: str) -> bytes:
        files = sorted(path for path in (self.experiment.parent / out).rglob("*") if path.is_file())
        return b"".join(path.read_bytes() for path in files)


@pytest.fixture
def runs(warm, told, write_experiment) -> Runs:
    url, behaviour = told
    behaviour.begin(None)
    return Runs(warm, write_experiment(rewards=[far(url)], evaluation={"every": 2, "images": 4}), behaviour)


@dataclass(frozen=True)
class Calm:
    records: list[str]
    memory: int


@pytest.fixture(scope="module")
def calm(warm, told, tiny, tmp_path_factory) -> Calm:
    """How the run goes with a server that behaves."""
    url, behaviour = told
    behaviour.begin(None)
    path = tmp_path_factory.mktemp("calm") / "tiny.yaml"
    path.write_text(json.dumps(tiny | {"rewards": [far(url)], "evaluation": {"every": 2, "images": 4}}))
    undisturbed = Runs(warm, path, behaviour)
    ended = undisturbed("calm")
    assert ended.code == 0, ended.out
    return Calm(undisturbed.records("calm"), ended.memory)


@pytest.mark.parametrize("fault", [*FAULTS, *OF_HEALTH])
def test_the_run_ends_with_its_state_saved_and_goes_on_where_it_was(fault, runs, calm):
    runs.behaviour.begin(fault, FIRST)
    ended = runs("out")
    assert not ended.hangs
    assert ended.seconds < LONGEST
    assert ended.code == 2, ended.out
    assert not ended.traceback
    assert "'far'" in ended.error
    assert fault in OF_HEALTH or "saved" in ended.out
    assert "\x1b" not in ended.out
    assert "\u202e" not in ended.out
    assert sum(line.startswith("error:") for line in ended.out.splitlines()) == 1
    assert ended.memory < calm.memory + MORE_MEMORY
    assert SECRET not in ended.out
    assert runs.behaviour.stolen == 0

    runs.behaviour.begin(None)
    again = runs("out", seconds=120)
    assert again.code == 0, again.out
    assert runs.records("out") == calm.records
    assert SECRET.encode() not in runs.written("out")


@pytest.mark.parametrize("fault", ["401 echo", "redirect", "html", "scores null", "too few", "nan", "deep json"])
def test_what_cannot_succeed_is_asked_once_by_each_that_asks(fault, runs):
    runs.behaviour.begin(fault, FIRST)
    assert runs("out").code == 2
    assert runs.behaviour.asked <= FIRST + 4  # requests at a time


@pytest.mark.parametrize("what", TOKENS)
def test_a_token_that_no_header_can_hold_is_refused_and_not_shown(what, runs):
    ended = runs("out", TOKENS[what])
    assert ended.code == 2
    assert "'token_env' names 'TOK', whose character" in ended.error
    assert not ended.traceback
    assert SECRET not in ended.out
    assert SECRET.encode() not in runs.written("out")
    assert runs.behaviour.asked == 0


def test_a_token_that_is_not_set_is_refused_by_the_name_of_its_variable(runs):
    ended = runs("out", None)
    assert ended.code == 2
    assert "'TOK'" in ended.error


@pytest.mark.parametrize("url", URLS)
def test_an_address_that_is_none_or_holds_a_token_is_refused_without_a_traceback(url, warm, write_experiment, tmp_path):
    ended = warm(["check", write_experiment(rewards=[far(url)])], tmp_path)
    assert ended.code == 2, ended.out
    assert not ended.traceback
    assert ":pass@" not in ended.out


def test_an_address_may_be_written_in_capitals(warm, write_experiment, tmp_path):
    assert warm(["check", write_experiment(rewards=[far("HTTP://127.0.0.1:1")])], tmp_path).code == 0


def test_a_token_is_not_in_what_child_processes_are_called_with_print_or_write(runs):
    runs.behaviour.begin("401 echo")
    words = ["run", str(runs.experiment), "--out", "kids", "--set", "seeds=[0, 1]", "--jobs", "1", "--no-report"]
    process = start(*words, folder=runs.experiment.parent, TOK=SECRET)
    listed = b""
    while process.poll() is None:
        listed += b"".join(_content(path) for path in Path("/proc").glob("[0-9]*/cmdline"))
        time.sleep(0.3)
    text = process.communicate()[0]
    assert process.returncode != 0
    assert b"aegpo" in listed
    assert SECRET.encode() not in listed
    assert SECRET not in text
    assert SECRET.encode() not in runs.written("kids")


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # it has ended
        return b""
