"""`aegpo push`: what arrives at a hub, byte for byte, and what is said where it refuses."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from command_line import Done, start
from loopback_hub import TOKEN, loopback_hub
from safetensors.torch import load
from test_sample_and_export import run_of

from aegpo.commands.export import ExportRequest, export


def push(url: str, folder: Path, *words: str, token: str = TOKEN, **environment: str) -> Done:
    """`aegpo push` in a process of its own, for it reads where the hub is when it starts."""
    own = {"HF_HOME": str(folder / "hub"), "HF_ENDPOINT": url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": token}
    process = start("push", *words, folder=folder, stderr=-1, **own | {"HF_HUB_OFFLINE": "0"} | environment)
    out, errors = process.communicate(timeout=250)
    return Done(process.returncode, out, errors)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, pipeline_folders) -> Path:
    return run_of("sd3", tmp_path_factory.mktemp("trained"), pipeline_folders["sd3"])


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "to"
    export(ExportRequest(trained, folder, layout="both", card=True))
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_byte_of_an_exported_folder_arrives(exported, tmp_path):
    with loopback_hub() as hub:
        done = push(hub.url, tmp_path, str(exported), "somebody/tiny")
    assert done.code == 0, done.stderr
    assert done.stdout == f"{hub.url}/somebody/tiny\n"
    assert hub.branches == {"main": content(exported)}
    assert {"README.md", "curves.png", "aegpo.json", "pytorch_lora_weights.safetensors"} <= hub.branches["main"].keys()
    assert hub.cards[0] == (exported / "README.md").read_text()
    assert hub.repositories["somebody/tiny"].get("visibility") is None  # as whoever owns it has chosen


@pytest.mark.slow
def test_a_run_is_exported_with_its_card_and_pushed(trained, exported, tmp_path):
    options = ("--private", "--revision", "trial", "--layout", "both", "--checkpoint", "2")
    with loopback_hub() as hub:
        done = push(hub.url, tmp_path, str(trained), "tiny", *options)
    assert done.code == 0, done.stderr
    assert done.stdout == f"{hub.url}/somebody/tiny/tree/trial\n"
    assert hub.repositories["somebody/tiny"]["visibility"] == "private"
    assert hub.branches["main"] == {}
    arrived, there = hub.branches["trial"], content(exported)
    assert arrived.keys() == there.keys()
    assert arrived["README.md"] == there["README.md"]
    weights = load(arrived["pytorch_lora_weights.safetensors"])
    assert weights.keys() == load(there["pytorch_lora_weights.safetensors"]).keys()
    assert not list(tmp_path.glob(".aegpo-push-*"))  # nothing stays here


@pytest.mark.parametrize(
    ("refuses", "there", "told"),
    [
        ((401, "no"), False, r"the hub does not accept your token: log in with 'hf auth login' or set HF_TOKEN again"),
        ((403, "no, {token}"), False, r"your token may not write there \(.*no, Bearer hf_\.\.\.\): log in with "),
        (
            (403, "no"),
            True,
            r"your token may not write there \(.*no\): log in with 'hf auth login' or set HF_TOKEN with",
        ),
        ((404, "gone"), False, r"it is not there for you; is the name right, and the branch\?"),
        ((500, "broken"), False, r"the hub answers 500: broken; give the same command again later"),
        ((422, "odd"), False, r"the hub refuses it with 422: odd"),
    ],
)
def test_a_refusal_is_one_line_with_the_way_out_and_without_the_token(refuses, there, told, exported, tmp_path):
    with loopback_hub(refuses=refuses, public=there) as hub:
        done = push(hub.url, tmp_path, str(exported), "somebody/tiny")
    assert done.code == 2
    assert re.search(rf"^error: somebody/tiny: {told}", done.stderr, flags=re.MULTILINE), done.stderr
    assert "Traceback" not in done.stderr
    assert TOKEN not in done.stderr + done.stdout
    assert hub.branches == {"main": {}}


def test_a_repository_that_is_public_already_is_not_taken_for_a_private_one(exported, tmp_path):
    with loopback_hub(public=True) as hub:
        done = push(hub.url, tmp_path, str(exported), "somebody/tiny", "--private")
    assert done.code == 2
    assert "error: somebody/tiny is there already and public, so --private would not hide what is pushed" in done.stderr
    assert hub.branches == {"main": {}}


def test_a_hub_that_is_not_there_or_may_not_be_asked_is_told(exported, tmp_path):
    done = push("http://127.0.0.1:9", tmp_path, str(exported), "somebody/tiny")
    assert done.code == 2
    assert re.search(r"^error: somebody/tiny: http://127\.0\.0\.1:9 cannot be reached \(.*\); check the", done.stderr)
    offline = push("http://127.0.0.1:9", tmp_path, str(exported), "somebody/tiny", HF_HUB_OFFLINE="1")
    assert offline.code == 2
    assert offline.stderr == "error: HF_HUB_OFFLINE is set, so nothing can be pushed; unset it\n"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["{exported}", "a/b/c"], "'a/b/c' is no name of a repository; give NAME or OWNER/NAME"),
        (["{exported}", "a/b", "--full"], "is exported already, so --checkpoint, --full and --layout do nothing"),
        (["{without}", "a/b"], "without has no model card (README.md); write one, export with --card, or name the run"),
        (["{empty}", "a/b"], "is not the folder of a run"),
    ],
)
def test_what_cannot_be_pushed_is_told_before_anything_is_made(words, told, exported, tmp_path):
    for name in ("without", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "without" / "aegpo.json").write_text("{}")
    places = {"exported": exported, "without": tmp_path / "without", "empty": tmp_path / "empty"}
    with loopback_hub() as hub:
        done = push(hub.url, tmp_path, *(word.format_map(places) for word in words))
    assert done.code == 2
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    assert hub.repositories == {}


def test_nobody_is_logged_in(exported, tmp_path):
    done = push("http://127.0.0.1:9", tmp_path, str(exported), "somebody/tiny", token="")
    assert done.code == 2
    assert (
        "error: nobody is logged in to http://127.0.0.1:9: log in with 'hf auth login' or set HF_TOKEN" in done.stderr
    )
