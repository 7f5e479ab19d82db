"""The tracker `accelerate` with W&B, Trackio and MLflow themselves, on files of this machine: `nox -s trackers`."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys

import pytest
from command_line import start
from exact_signals import LOADED, after, write_plugin

if any(importlib.util.find_spec(name) is None for name in ("wandb", "trackio", "mlflow")):
    pytest.skip("nox -s trackers", allow_module_level=True)

TINY = """
name: tiny
training_steps: 6
model: shapes
prompts: {train_count: 3, evaluation_count: 4}
rollouts: {prompts_per_step: 2, rollouts_per_step: 6, denoising_steps: 3}
rewards: [palette]
allocator: {kind: entropy, low: 2, high: 4}
selector: {kind: entropy-peak, top_k: 2}
tree: branching
sampler: flow-sde
advantage: group
objective: {kind: clipped, beta: 0.01}
optimizer: {rollouts_per_update: 3}
evaluation: {every: 3, images: 2}
checkpoint: {every: 2}
trackers:
  - {kind: accelerate, log_with: SERVICE, offline: true, project: mine, tags: [tried]}
"""
PATIENCE = 240  # seconds
NAMES = {"reward", "reward_palette", "reward_std_mean", "zero_std_ratio", "approx_kl", "clipfrac", "ratio_mean"}
NAMES |= {"ratio_std", "kl_loss", "grad_norm", "images_per_second", "signal/entropy/step_0"}
NAMES |= {"rollouts_per_prompt/max", "chosen_steps/share_0"}


def run(folder, service, until=None, **environment):
    """The run to its end, or stopped by SIGTERM after step `until`; its folder, what it printed and its code."""
    (folder / "tiny.yaml").write_text(TINY.replace("SERVICE", service))
    write_plugin(folder)
    private = {"TRACKIO_DIR": str(folder / "trackio"), "HOME": str(folder), "WANDB_API_KEY": "", "WANDB_SILENT": "true"}
    private |= {} if until is None else after(until, signal.SIGTERM)
    words = ("run", "tiny.yaml", *LOADED, "--out", "out", "--no-report")
    process = start(*words, folder=folder, **private, **environment)
    printed, _ = process.communicate(timeout=PATIENCE)
    return folder / "out" / "tiny" / "main" / "seed-0", printed, process.returncode


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The record of the run that nobody was told of."""
    folder = tmp_path_factory.mktemp("plain")
    (folder / "tiny.yaml").write_text(TINY.partition("trackers:")[0])
    process = start("run", "tiny.yaml", "--out", "out", "--no-report", folder=folder)
    printed, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, printed
    return (folder / "out" / "tiny" / "main" / "seed-0" / "metrics.jsonl").read_bytes()


def broken_off(folder, service, plain):
    """A run that was interrupted and went on."""
    made, printed, code = run(folder, service, until=3)
    assert code == 130, printed
    assert (made / "metrics.jsonl").read_bytes().count(b"\n") == 3
    assert not (made / "finished.json").exists()
    first = json.loads((made / "tracking" / f"{service}.json").read_text())["id"]
    made, printed, code = run(folder, service)
    assert code == 0, printed
    note = json.loads((made / "tracking" / f"{service}.json").read_text())
    assert (note["id"], note["step"], note["evaluation"]) == (first, 6, 6)
    assert (made / "metrics.jsonl").read_bytes() == plain
    return made, first


def test_trackio_has_every_step_once_and_the_panels_with_captions(tmp_path, plain):
    broken_off(tmp_path, "trackio", plain)
    code = (
        "import json, trackio; from trackio.sqlite_storage import SQLiteStorage as S\n"
        "[run] = trackio.Api().runs('mine')\n"
        "print(json.dumps([run.name, run.config, S.get_logs('mine', run.name)]))"
    )
    name, config, rows = json.loads(python(code, TRACKIO_DIR=str(tmp_path / "trackio")).splitlines()[-1])
    assert name == "main/seed-0"
    assert config["rollouts.rollouts_per_step"] == 6
    assert config["_Group"] == "main"
    steps = [row for row in rows if "reward" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    assert steps[0].keys() >= NAMES
    assert [row["step"] for row in rows if "evaluation/palette" in row] == [0, 3, 6]
    shown = [row["evaluation/0"] for row in rows if "evaluation/0" in row]
    assert len(shown) == 3
    assert all("(base | policy; palette 0." in each["caption"] for each in shown)
    assert all((tmp_path / "trackio" / "media" / each["file_path"]).stat().st_size > 0 for each in shown)


def test_mlflow_has_every_step_once_the_options_and_the_panels(tmp_path, plain):
    made, ident = broken_off(tmp_path, "mlflow", plain)
    code = (
        f"import json, mlflow; mlflow.set_tracking_uri('sqlite:///{made.parents[1]}/mlflow.db')\n"
        "c = mlflow.MlflowClient(); [e] = [e for e in c.search_experiments() if e.name == 'mine']\n"
        "[run] = c.search_runs([e.experiment_id]); ident = run.info.run_id\n"
        "history = lambda name: [m.step for m in c.get_metric_history(ident, name)]\n"
        "print(json.dumps([ident, run.info.run_name, run.data.tags, run.data.params, list(run.data.metrics),\n"
        "    history('reward'), history('evaluation/palette'), [a.path for a in c.list_artifacts(ident, 'images')],\n"
        "    mlflow.artifacts.load_text(f'{run.info.artifact_uri}/evaluation/step-000003.txt')]))"
    )
    found, name, tags, params, metrics, steps, evaluations, images, captions = json.loads(python(code).splitlines()[-1])
    assert (found, name, tags["group"], tags["tried"]) == (ident, "main/seed-0", "main", "true")
    assert params["rollouts.rollouts_per_step"] == "6"
    assert set(metrics) >= NAMES
    assert (steps, evaluations) == ([1, 2, 3, 4, 5, 6], [0, 3, 6])
    assert len([path for path in images if path.endswith(".png")]) == 3 * 2
    assert "(base | policy; palette 0." in captions


def test_wandb_offline_has_every_step_once_under_one_id(tmp_path, plain):
    made, ident = broken_off(tmp_path, "wandb", plain)
    files = sorted((made / "tracking" / "wandb").glob(f"offline-run-*-{ident}/run-{ident}.wandb"))
    assert len(files) == 2  # a file each time; `wandb sync` puts them together by the id
    code = (
        "import json, sys; from wandb.proto import wandb_internal_pb2 as pb\n"
        "def rows(data, whole=b''):\n"
        "    place = 7\n"  # blocks of 32 KiB, of pieces with checksum, length and part, as in LevelDB's log
        "    while place + 7 <= len(data):\n"
        "        if 32768 - place % 32768 < 7: place += 32768 - place % 32768; continue\n"
        "        size, part = int.from_bytes(data[place + 4 : place + 6], 'little'), data[place + 6]\n"
        "        whole += data[place + 7 : place + 7 + size]; place += 7 + size\n"
        "        if part in (1, 4): yield pb.Record.FromString(whole); whole = b''\n"
        "for record in (record for path in sys.argv[1:] for record in rows(open(path, 'rb').read())):\n"
        "    if record.WhichOneof('record_type') == 'run':\n"
        "        run = record.run; told = [run.run_id, run.project, run.run_group, run.display_name, [*run.tags]]\n"
        "        print(json.dumps({'run': told}))\n"
        "    told = {'/'.join(each.nested_key): json.loads(each.value_json) for each in record.history.item}\n"
        "    print(json.dumps({**told, 'step': record.history.step.num}))\n"
    )
    rows = [json.loads(line) for line in python(code, *map(str, files)).splitlines() if line.startswith("{")]
    assert next(row["run"] for row in rows if "run" in row) == [ident, "mine", "main", "main/seed-0", ["tried"]]
    assert [row["step"] for row in rows if "reward" in row] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows if "evaluation/palette" in row] == [0, 3, 6]
    assert {name for row in rows for name in row} >= NAMES
    shown = [row["evaluation/captions"] for row in rows if "evaluation/captions" in row]
    assert [len(captions) for captions in shown] == [2, 2, 2]
    assert all("(base | policy; palette 0." in each for captions in shown for each in captions)


def test_wandb_without_a_login_is_one_line_before_the_first_step(tmp_path):
    (tmp_path / "tiny.yaml").write_text(TINY.replace("SERVICE", "wandb").replace("offline: true, ", ""))
    private = {"HOME": str(tmp_path), "WANDB_API_KEY": "", "NETRC": str(tmp_path / "none")}
    process = start("run", "tiny.yaml", "--out", "out", "--no-report", folder=tmp_path, **private)
    printed, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 2
    said = [line for line in printed.splitlines() if "accelerate" in line]
    assert said == [
        "error: tracker 'accelerate': wandb did not begin the run: nobody is logged in; give  wandb login  or set "
        "WANDB_API_KEY, or set 'offline: true' and give  wandb sync  later"
    ]
    assert not (tmp_path / "out" / "tiny" / "main" / "seed-0" / "metrics.jsonl").exists()


def test_mlflow_without_a_network_is_one_line_before_the_first_step(tmp_path):
    nowhere = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    made, printed, code = run(tmp_path, "mlflow", **nowhere)
    assert code == 2
    [said] = [line for line in printed.splitlines() if "tracker 'accelerate'" in line]
    assert said.startswith("error: tracker 'accelerate': mlflow did not begin the run: ")
    assert said.endswith("; set MLFLOW_TRACKING_URI to a server that answers, or 'offline: true'")
    assert not (made / "metrics.jsonl").exists()


def python(code, *arguments, **environment):
    """What a script prints, in a process of its own."""
    command, variables = [sys.executable, "-c", code, *arguments], os.environ | environment
    done = subprocess.run(command, capture_output=True, text=True, env=variables, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
