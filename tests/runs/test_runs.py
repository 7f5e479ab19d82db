import errno
import fcntl
import json
import os
import signal
import subprocess
import sys

import pytest

from aegpo.config.loading import load_experiment_file, parse_experiment
from aegpo.core.files import write_atomically
from aegpo.core.verdicts import VerdictSpec
from aegpo.errors import AegpoError, CheckpointError
from aegpo.plugin.manager import load_registries, plugin_manager
from aegpo.runs import folders
from aegpo.runs import manifest as manifests
from aegpo.runs.folders import Run
from aegpo.runs.software import versions

EXPERIMENT = """
name: tiny
model: shapes
rollouts: {prompts_per_step: 4, rollouts_per_step: 48}
rewards: [scene]
allocator: uniform
selector: uniform
tree: independent
sampler: flow-sde
advantage: group
objective: clipped
arms:
  grpo: {}
"""


@pytest.fixture(scope="module")
def registries():
    return load_registries(plugin_manager())


@pytest.fixture
def run(tmp_path, registries):
    return a_run(tmp_path, registries)


def a_run(out, registries, *overrides):
    path = out / "tiny.yaml"
    path.write_text(EXPERIMENT)
    file = load_experiment_file(path, registries, overrides)
    return Run("grpo", 0, file.experiment("grpo", 0), folders.run_folder(out, file.name, "grpo", 0))


def begin(run, plugins=(), threads=1):
    run.folder.mkdir(parents=True, exist_ok=True)
    return manifests.open_manifest(run, plugins, threads)


def test_a_run_lives_in_a_folder_named_after_experiment_arm_and_seed(tmp_path, run):
    assert run.folder == tmp_path / "tiny" / "grpo" / "seed-0"


def test_the_manifest_holds_experiment_versions_plugins_commit_and_threads(run, registries):
    begin(run, plugins=[("aegpo-jpeg", "0.1.0")], threads=3)
    manifest = json.loads((run.folder / "manifest.json").read_text())
    assert (manifest["format"], manifest["arm"], manifest["seed"]) == (1, "grpo", 0)
    assert manifest["experiment"] == run.experiment.model_dump(mode="json")
    assert parse_experiment(manifest["experiment"], registries).model_dump(mode="json") == manifest["experiment"]
    assert manifest["plugins"] == [["aegpo-jpeg", "0.1.0"]]
    assert manifest["threads"] == 3
    assert {"python", "aegpo", "torch", "diffusers", "transformers", "numpy"} <= manifest["versions"].keys()
    assert manifest["versions"]["python"] == ".".join(str(part) for part in sys.version_info[:3])


def test_the_first_start_writes_the_manifest_and_later_ones_keep_it(run):
    first = begin(run, threads=3)
    assert begin(run, threads=8) == first


def test_a_changed_experiment_is_refused_with_every_difference_and_the_ways_out(tmp_path, registries, run):
    begin(run)
    (run.folder / "metrics.jsonl").write_text('{"step": 1}\n')
    changes = ("optimizer.learning_rate=0.5", "rewards.0.weight=2", "allocator={kind: random, low: 10, high: 14}")
    changed = a_run(tmp_path, registries, *changes)
    with pytest.raises(CheckpointError) as caught:
        manifests.check_manifest(changed)
    rate = run.experiment.optimizer.learning_rate
    assert str(caught.value).splitlines() == [
        f"grpo seed 0 was begun with another experiment in {run.folder}:",
        "  rewards[0].weight: 1.0 -> 2.0",
        '  allocator.kind: "uniform" -> "random"',
        "  allocator.low: (absent) -> 10",
        "  allocator.high: (absent) -> 14",
        f"  optimizer.learning_rate: {json.dumps(rate)} -> 0.5",
        "undo the change to go on, start the run over with --fresh, or keep both with another --out",
    ]


def test_a_start_that_learned_nothing_does_not_bind_the_corrected_experiment(tmp_path, registries, run):
    begin(run, threads=3)
    corrected = a_run(tmp_path, registries, "optimizer.learning_rate=0.5")
    manifests.check_manifest(corrected)
    manifest = begin(corrected, threads=1)
    assert manifest == manifests.read_manifest(run.folder)
    assert manifest["experiment"]["optimizer"]["learning_rate"] == 0.5
    assert manifest["threads"] == 1


@pytest.mark.parametrize("left", ["metrics.jsonl", "checkpoints/step-000001/state.json"])
def test_a_start_that_learned_something_binds(tmp_path, registries, run, left):
    begin(run)
    (run.folder / left).parent.mkdir(parents=True, exist_ok=True)
    (run.folder / left).write_text("x")
    with pytest.raises(CheckpointError, match=r"optimizer\.learning_rate"):
        begin(a_run(tmp_path, registries, "optimizer.learning_rate=0.5"))


def test_a_run_may_go_on_with_smaller_micro_batches_and_the_change_is_told(tmp_path, registries, run):
    begin(run)
    (run.folder / "metrics.jsonl").write_text('{"step": 1}\n')
    smaller = a_run(tmp_path, registries, "rollouts.micro_batch=8", "optimizer.micro_batch=4")
    manifest = begin(smaller)
    assert manifests.changed_batches(smaller, manifest) == [
        f"rollouts.micro_batch: {run.experiment.rollouts.micro_batch} -> 8",
        f"optimizer.micro_batch: {run.experiment.optimizer.micro_batch} -> 4",
    ]
    assert manifests.changed_batches(run, manifest) == []


def test_words_about_an_arm_bind_nothing_and_an_older_manifest_has_none(tmp_path, registries, run):
    begun = begin(run)
    (run.folder / "metrics.jsonl").write_text("x")
    changed = a_run(tmp_path, registries, "about=other words")
    assert manifests.experiment_changes(changed.experiment, begun) == []
    assert begin(changed) == begun
    older = {**begun, "experiment": {name: value for name, value in begun["experiment"].items() if name != "about"}}
    assert manifests.identity(older) == manifests.identity(begun)
    assert manifests.experiment_changes(changed.experiment, older) == []


def test_the_same_experiment_and_a_folder_without_a_manifest_are_accepted(run):
    manifests.check_manifest(run)
    begin(run)
    manifests.check_manifest(run)


def test_a_manifest_from_before_there_were_kinds_and_schedules_of_optimizers_goes_on_as_their_defaults(
    tmp_path, registries, run
):
    manifest = begin(run)
    for key in ("kind", "schedule", "momentum"):
        del manifest["experiment"]["optimizer"][key]
    (run.folder / "manifest.json").write_text(json.dumps(manifest))
    (run.folder / "metrics.jsonl").write_text('{"step": 1}\n')
    assert begin(run) == manifest
    assert parse_experiment(manifest["experiment"], registries) == run.experiment
    with pytest.raises(CheckpointError, match=r'optimizer\.schedule\.kind: "constant" -> "linear"'):
        begin(a_run(tmp_path, registries, "optimizer.schedule=linear"))


@pytest.mark.parametrize(
    ("old", "new", "lines"),
    [
        ({"a": 1}, {"a": 1}, []),
        ({"a": 1}, {"a": 2}, ["a: 1 -> 2"]),
        ({"a": {"b": None}}, {"a": {"b": [1, 2]}}, ["a.b: null -> [1, 2]"]),
        ({"a": [1, 2]}, {"a": [1, 3]}, ["a: [1, 2] -> [1, 3]"]),
        ({"a": [{"k": 1}]}, {"a": [{"k": 1}, {"k": 2}]}, ['a[1]: (absent) -> {"k": 2}']),
        ({"a": 1, "b": 2}, {"b": 2}, ["a: 1 -> (absent)"]),
        ({"a": True}, {"a": 1}, ["a: true -> 1"]),
        ({"a": "x"}, {"a": {"kind": "x"}}, ['a: "x" -> {"kind": "x"}']),
    ],
)
def test_differences_are_shown_as_key_old_new(old, new, lines):
    assert manifests.differences(old, new) == lines


@pytest.mark.parametrize("content", [b"", b'{"format": 1, "ar', b"[]", b'{"format": 2}', b"\xff"])
def test_a_manifest_that_cannot_be_read_is_an_error_with_a_way_out(run, content):
    begin(run)
    (run.folder / "manifest.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"manifest\.json.*--fresh"):
        manifests.check_manifest(run)


def test_another_version_of_a_library_is_noticed(run):
    manifest = begin(run)
    assert manifests.changed_versions(manifest) == []
    manifest["versions"]["numpy"] = "1.0"
    assert manifests.changed_versions(manifest) == [f'numpy: "1.0" -> "{versions()["numpy"]}"']


def test_a_run_is_finished_once_it_is_marked(run):
    begin(run)
    assert not run.finished
    run.mark_finished(40)
    assert run.finished
    assert json.loads((run.folder / "finished.json").read_text()) == {"step": 40}


@pytest.mark.parametrize("content", [b"", b'{"step": 41}\n', b'{"stap": 40}\n', b"[" * 100_000, b"\xff"])
def test_a_damaged_note_that_a_run_is_finished_is_refused(run, content):
    begin(run)
    (run.folder / "finished.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"finished\.json.*; delete it: .* goes on from the newest checkpoint"):
        _ = run.finished


def test_a_note_of_fewer_steps_is_of_a_run_that_got_more_since(run):
    begin(run)
    run.mark_finished(39)
    assert not run.finished


HOLDER = """
import sys, time
from pathlib import Path
from aegpo.runs.folders import locked
with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_kept_out_until_the_first_one_dies(run):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(run.folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "locked\n"
        with (
            pytest.raises(AegpoError, match=f"process {holder.pid} is running .*seed-0; wait for it"),
            folders.locked(run.folder),
        ):
            pass
    finally:
        os.kill(holder.pid, signal.SIGKILL)
        holder.communicate()
    with folders.locked(run.folder):
        pass
    with folders.locked(run.folder):
        pass


def test_a_disk_without_locks_is_an_error_and_nobody_is_let_in(run, monkeypatch):
    def refuse(*words):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with (
        pytest.raises(AegpoError, match=r"seed-0 cannot be kept from .*: its disk has no locks \(No locks.*\); choose"),
        folders.locked(run.folder),
    ):
        pytest.fail("it was let in")


def test_starting_over_leaves_nothing_but_the_lock(run):
    begin(run)
    run.mark_finished(4)
    (run.checkpoints / "step-000004").mkdir(parents=True)
    (run.checkpoints / "step-000004" / "state.json").write_text("{}")
    with folders.locked(run.folder):
        folders.start_over(run.folder)
    assert [path.name for path in run.folder.iterdir()] == [".lock"]


def test_the_order_and_what_is_compared_are_noted_and_rewritten_only_when_they_changed(tmp_path):
    folder = tmp_path / "smoke"
    folders.write_order(folder, ["grpo", "aegpo"], [0, 1], VerdictSpec())
    path = folder / "order.json"
    assert folders.read_order(folder) == folders.Order(("grpo", "aegpo"), (0, 1))
    written = path.stat().st_ino
    folders.write_order(folder, ["grpo", "aegpo"], [0, 1], VerdictSpec())
    assert path.stat().st_ino == written
    folders.write_order(folder, ["grpo"], [0], VerdictSpec())
    assert folders.read_order(folder) == folders.Order(("grpo",), (0,))
    path.write_text('{"arms": ["grpo"], "seeds": [0]}')  # as versions wrote it that knew no checksum
    assert folders.read_order(folder) == folders.Order(("grpo",), (0,))
    path.write_text(path.read_text().replace("grpo", "grp\\u00f6", 1) + "x")
    said: list[str] = []
    folders.write_order(folder, ["grpo"], [0], VerdictSpec(), said.append)
    assert folders.read_order(folder) == folders.Order(("grpo",), (0,))
    assert said == [f"cannot read {path}: it is not JSON: Extra data: line 1 column 38 (char 37); it is written anew"]
    asked = {"comparisons": [["aegpo", "grpo"]], "margin": 0.02, "target": 0.8}
    folders.write_order(folder, ["grpo", "aegpo"], [0], VerdictSpec(**asked))
    assert folders.read_order(folder).plain() == {"arms": ["grpo", "aegpo"], "seeds": [0], **asked}
    folders.write_order(folder, ["grpo"], [0], VerdictSpec(), about={"grpo": "the reference"})
    assert folders.read_order(folder).about == {"grpo": "the reference"}
    path.write_text('{"arms": ["grpo"], "seeds": [0], "about": ["the reference"]}')
    with pytest.raises(CheckpointError, match="its 'about' maps no arms to sentences; delete it"):
        folders.read_order(folder)


def test_a_file_is_replaced_whole_and_leaves_nothing_behind(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, b"one")
    write_atomically(path, b"two")
    assert path.read_bytes() == b"two"
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_checkpoints_without_a_manifest_are_not_gone_on_with(run):
    (run.checkpoints / "step-000002").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"has checkpoints but no manifest\.json"):
        begin(run)
