"""Weights, run folders and prompts of strangers: nothing in them is run, imported or sent without a word."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from damage import sign
from served import Evil, serving

LAST = "tiny/main/seed-0/checkpoints/step-000004"
CODE = "from pathlib import Path\nPath('was-here').touch()\n"


@pytest.fixture(scope="module")
def theirs(warm, tiny, tmp_path_factory) -> Path:
    """A folder with a finished run."""
    folder = tmp_path_factory.mktemp("theirs")
    (folder / "tiny.yaml").write_text(json.dumps(tiny))
    ended = warm(["run", "tiny.yaml", "--out", ".", "--no-report"], folder)
    assert ended.code == 0, ended.out
    return folder


@pytest.fixture
def copied(theirs, tmp_path) -> Path:
    """A copy of it, to do harm with."""
    return Path(shutil.copytree(theirs, tmp_path / "copied"))


def changed_manifest(folder: Path, **changes) -> None:
    """Changes sections of the experiment that the run's manifest names."""
    path, manifest = unsigned_manifest(folder)
    manifest["experiment"] |= changes
    path.write_text(json.dumps(manifest))
    state = json.loads((folder / LAST / "state.json").read_text())
    (folder / LAST / "state.json").write_text(json.dumps({key: state[key] for key in state if key != "run"}))
    sign(folder / LAST)  # a stranger knows how


def unsigned_manifest(folder: Path) -> tuple[Path, dict]:
    """The run's manifest as one of a version that wrote neither its checksum nor what is in the weights."""
    path = folder / "tiny/main/seed-0/manifest.json"
    manifest = json.loads(path.read_text())
    return path, {key: value for key, value in manifest.items() if key not in ("crc32", "base")}


def pickles_in_place_of_weights(folder: Path, evil: bytes) -> int:
    """Every safetensors file becomes a pickle, under its own name and under those that torch's files have."""
    files = list(folder.rglob("*.safetensors"))
    for path in files:
        path.write_bytes(evil)
        if path.stem in ("model", "diffusion_pytorch_model"):
            path.unlink()
            path.with_name({"model": "pytorch_model"}.get(path.stem, path.stem) + ".bin").write_bytes(evil)
    return len(files)


@pytest.mark.parametrize("words", [("sample", "."), ("evaluate", "tiny"), ("export", ".", "--to", "out"), ("run", ".")])
def test_pickles_in_place_of_checkpoints_are_not_read(words, warm, copied, tmp_path):
    assert pickles_in_place_of_weights(copied / LAST, Evil(tmp_path / "was-here").pickled()) >= 1
    ended = warm(words, copied)
    assert not (tmp_path / "was-here").exists()
    assert (ended.code, ended.traceback) in ((2, False), (0, False)), ended.out  # 0: it has finished and is not read


def test_pickles_in_place_of_a_models_weights_are_not_read(warm, tiny, write_experiment, tmp_path):
    weights = shutil.copytree(tiny["model"]["weights"], tmp_path / "weights")
    assert pickles_in_place_of_weights(Path(weights), Evil(tmp_path / "was-here").pickled()) == 2
    path = write_experiment(model={"kind": "shapes", "weights": str(weights)})
    ended = warm(["run", path, "--out", "runs"], tmp_path)
    assert (ended.code, ended.traceback) == (2, False), ended.out
    assert not (tmp_path / "was-here").exists()


def test_code_beside_weights_is_not_run_and_nobody_is_asked_whether_to(warm, tiny, write_experiment, tmp_path):
    weights = Path(shutil.copytree(tiny["model"]["weights"], tmp_path / "weights"))
    (weights / "tokenizer" / "theirs.py").write_text(f"{CODE}class Theirs: pass\n")
    named = weights / "tokenizer" / "tokenizer_config.json"
    config = json.loads(named.read_text()) if named.exists() else {}
    mapped = {"tokenizer_class": "Theirs", "auto_map": {"AutoTokenizer": ["theirs.Theirs", "theirs.Theirs"]}}
    named.write_text(json.dumps(config | mapped))
    path = write_experiment(model={"kind": "shapes", "weights": str(weights)}, training_steps=1)
    ended = warm(["run", path, "--out", "runs", "--no-report"], tmp_path)
    assert (ended.code in (0, 2), ended.traceback) == (True, False), ended.out
    assert "y/N" not in ended.out
    assert not (tmp_path / "was-here").exists()


def test_code_in_a_run_folder_and_plugins_that_its_manifest_names_are_not_imported(warm, copied):
    for name in ("plugin.py", "sitecustomize.py", "tiny.py", "aegpo_theirs.py"):
        (copied / "tiny/main/seed-0" / name).write_text(CODE)
    path, manifest = unsigned_manifest(copied)
    path.write_text(json.dumps(manifest | {"plugins": [["aegpo_theirs", "1"], ["tiny/main/seed-0/plugin.py", "1"]]}))
    for words in (("sample", "."), ("run", ".")):
        ended = warm(words, copied)
        assert not ended.traceback, ended.out
    assert not list(copied.rglob("was-here"))


@pytest.mark.parametrize(
    "text", ["!!python/object/apply:os.system ['touch was-here']", "!!python/name:os.system ''", "!Theirs {a: 1}"]
)
def test_tags_of_yaml_make_no_objects(text, warm, write_experiment, tmp_path):
    path = write_experiment()
    path.write_text(path.read_text()[:-2] + f",\n extra: {text}\n}}")
    ended = warm(["check", path], tmp_path)
    assert (ended.code, ended.traceback) == (2, False), ended.out
    assert not (tmp_path / "was-here").exists()


def test_who_is_sent_images_and_a_token_is_said_when_a_run_folder_names_it(warm, copied):
    with serving("--port", 0, "--token-env", "TOK", TOK="secret") as server:
        address = f"http://127.0.0.1:{server.port}"
        changed_manifest(copied, rewards=[{"kind": "remote", "name": "theirs", "url": address, "token_env": "TOK"}])
        ended = warm(["evaluate", "tiny"], copied, environment={"TOK": "secret"})
    said = f"reward 'theirs' sends images and prompts to {address} with the token in TOK, as the run's manifest says"
    assert said in ended.out
    asked_for = warm(["evaluate", "tiny", "--rewards", "palette", "--out", "mine"], copied)
    assert asked_for.code == 0, asked_for.out
    assert "sends images" not in asked_for.out


def test_a_report_of_finished_runs_asks_no_server_and_loads_no_weights(warm, copied):
    changed_manifest(
        copied,
        rewards=[{"kind": "remote", "name": "theirs", "url": "http://127.0.0.1:9", "token_env": "NOT_SET"}],
        model={"kind": "shapes", "weights": str(copied / "nowhere")},
    )
    ended = warm(["run", "tiny"], copied)
    assert (ended.code, ended.traceback) == (0, False), ended.out
    assert "report: " in ended.out


def test_a_file_that_is_no_image_is_not_sent_as_a_prompts_image(warm, write_experiment, tmp_path):
    (tmp_path / "id_rsa").write_text("a private key")
    line = {"prompt": "a red circle", "image": str(tmp_path / "id_rsa")}
    (tmp_path / "theirs.jsonl").write_text(json.dumps(line) + "\n")
    with serving("--port", 0, "--token-env", "TOK", TOK="secret") as server:
        remote = {"kind": "remote", "url": f"http://127.0.0.1:{server.port}", "token_env": "TOK"}
        path = write_experiment(rewards=[remote], prompts={"train": "theirs.jsonl", "evaluation_count": 4})
        path.write_text(path.read_text().replace('"prompts_per_step": 2', '"prompts_per_step": 1'))
        ended = warm(["run", path, "--out", "runs"], tmp_path, environment={"TOK": "secret"})
    assert (ended.code, ended.traceback) == (2, False), ended.out
    assert "line 1: 'id_rsa' in" in ended.error
    assert "is no image" in ended.error


NAMED = {
    "experiment": lambda name: {"name": name},
    "arm": lambda name: {"arms": {name: {}}},
    "label": lambda name: {"rewards": [{"kind": "palette", "name": name}]},
}


@pytest.mark.parametrize("where", NAMED)
def test_names_that_would_steer_a_terminal_or_a_path_are_refused(where, warm, tiny, tmp_path):
    """A label is no path, and is escaped in pages."""
    for name in ("\x1b[2Jgone", "../../up", "a/b", "<script>alert(1)</script>")[: 1 if where == "label" else 4]:
        data = tiny | NAMED[where](name)
        (tmp_path / "theirs.yaml").write_text(json.dumps(data))
        ended = warm(["check", "theirs.yaml"], tmp_path)
        assert (ended.code, ended.traceback) == (2, False), (name, ended.out)
        assert "\x1b" not in ended.out
