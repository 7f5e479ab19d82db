"""Checkpoints of sharded weights: written by three processes while they go on, read by one, damaged in every way."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch
from teams import failures_in_team
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from aegpo.errors import CheckpointError, DiskError
from aegpo.parallel.dtensors import own_part, sharded, whole
from aegpo.runs.checkpoints import Checkpoint, load_latest, load_step, save
from aegpo.runs.saving import begin
from aegpo.runs.sharded_files import checksum

pytestmark = pytest.mark.slow
SIZE = 3
RUN = {"arm": "grpo", "seed": 0, "experiment": "a" * 64}


def of_step(step: int) -> Checkpoint:
    """What a run of whole weights has after a step."""
    rng = torch.Generator().manual_seed(step)
    shapes = {"policy/a.weight": (7, 3), "ema/a.weight": (7, 3), "optimizer/a.weight/exp_avg": (7, 3)}
    tensors = {name: torch.randn(shape, generator=rng) for name, shape in shapes.items()}
    tensors |= {"optimizer/a.weight/step": torch.tensor(float(step)), "rng/torch": torch.get_rng_state()}
    return Checkpoint(step, tensors, {"updates": step, "parts": {}}, RUN, {"metrics.jsonl": [step, 1]})


def spread(checkpoint: Checkpoint) -> Checkpoint:
    """The same of a run whose weights are sharded over all processes."""
    like = weights()["a.weight"]
    cut = {name: own_part(each, like) for name, each in checkpoint.tensors.items() if each.shape == like.shape}
    return dataclasses.replace(checkpoint, tensors=checkpoint.tensors | cut)


def weights() -> dict[str, torch.Tensor]:
    return {"a.weight": distribute_tensor(torch.zeros(7, 3), init_device_mesh("cpu", (SIZE,)), [Shard(0)])}


def same(found: Checkpoint | None, step: int) -> bool:
    wanted = of_step(step)
    assert found is not None
    told = (found.step, found.state, found.run, found.records)
    return (
        told == (wanted.step, wanted.state, wanted.run, wanted.records)
        and found.tensors.keys() == wanted.tensors.keys()
        and all(torch.equal(found.tensors[name], value) for name, value in wanted.tensors.items() if "rng" not in name)
    )


# --- in each of three processes --------------------------------------------------------------------------------------


def checkpoints_are_put_in_place_when_all_have_written(team, folder):
    for step in (1, 2, 3):
        saving = begin(folder / "run", spread(of_step(step)), 2, team)
        assert saving is not None
        assert saving.step == step
        while not saving.in_place():
            if team.first:  # whatever is there is whole
                found = load_latest(folder / "run", report=pytest.fail)
                assert found is None or found.step >= step - 1
        assert same(load_latest(folder / "run", report=pytest.fail), step)
        saving.finish()
    assert sorted(path.name for path in (folder / "run").iterdir()) == ["step-000002", "step-000003"]


def each_reads_its_own_part(team, folder):
    found = load_latest(folder / "run", report=pytest.fail, run=RUN, later=True)
    assert found.tensors == {}
    tensors = found.stored.read(weights=weights())
    assert sharded(tensors).keys() == {"policy/a.weight", "ema/a.weight", "optimizer/a.weight/exp_avg"}
    assert same(dataclasses.replace(found, tensors={name: whole(each) for name, each in tensors.items()}), 3)
    assert sharded(found.stored.read(prefixes=["ema"], weights=weights())).keys() == {"ema/a.weight"}


def whole_weights_are_read_as_parts(team, folder):
    if team.first:
        save(folder / "whole", of_step(5), keep=1)
    team.told("written")
    found = load_step(folder / "whole", 5, later=True)
    tensors = found.stored.read(weights=weights())
    assert sharded(tensors).keys() == {"policy/a.weight", "ema/a.weight", "optimizer/a.weight/exp_avg"}
    assert same(dataclasses.replace(found, tensors={name: whole(each) for name, each in tensors.items()}), 5)
    assert begin(folder / "whole", of_step(6), 1, team) is None
    team.told("written by the first")
    assert same(load_step(folder / "whole", 6), 6)


def a_full_disk_leaves_the_checkpoint_before(team, folder):
    target = folder / "full"
    if team.first:
        shutil.copytree(folder / "run", target)
    team.told("copied")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if team.place.rank == 1:  # the system refuses larger files as it refuses a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (50, before[1]))
    saving = begin(target, spread(of_step(4)), 2, team)
    while not saving.in_place():
        pass
    told = r"step 4 cannot be written to .*File too large; checkpoints that are there: 2, 3; make room"
    with pytest.raises(DiskError, match=told):
        saving.finish()
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    team.told("refused")
    assert sorted(path.name for path in target.iterdir()) == ["step-000002", "step-000003"]
    team.told("looked")
    if team.first:
        (target / "step-000007").write_text("in the way")
    saving = begin(target, spread(of_step(7)), 2, team)
    with pytest.raises(CheckpointError, match="is a file where the checkpoint of step 7 goes"):
        saving.finish()


CHECKS = (
    checkpoints_are_put_in_place_when_all_have_written,
    each_reads_its_own_part,
    whole_weights_are_read_as_parts,
    a_full_disk_leaves_the_checkpoint_before,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Where the processes worked, and what failed."""
    folder = tmp_path_factory.mktemp("sharded")
    return folder, failures_in_team(SIZE, CHECKS, folder)


@pytest.mark.parametrize("name", [check.__name__ for check in CHECKS])
def test_in_a_team_of_three(made, name):
    assert name not in made[1], "\n".join(made[1][name])


# --- in a process alone ----------------------------------------------------------------------------------------------


@pytest.fixture
def run(made, tmp_path):
    """A copy of two checkpoints, of steps 2 and 3."""
    shutil.copytree(made[0] / "run", tmp_path / "run")
    return tmp_path / "run"


def test_a_process_alone_reads_what_three_wrote(run):
    assert same(load_latest(run, report=pytest.fail, run=RUN), 3)
    assert load_step(run, 2, prefixes=("policy",)).tensors.keys() == {"policy/a.weight"}
    names = sorted(path.name for path in (run / "step-000003").iterdir())
    assert names == ["checksums.json", "optimizer.safetensors", "rng.safetensors", "shards", "state.json"]
    rights = {path.stat().st_mode & 0o777 for path in (run / "step-000003").rglob("*") if path.is_file()}
    assert len(rights) == 1


def test_what_is_read_later_is_copied_where_it_is_saved_again(run):
    before = {path.name: path.read_bytes() for path in (run / "step-000003").rglob("*") if path.is_file()}
    found = load_latest(run, report=pytest.fail, later=True)
    save(run, dataclasses.replace(found, state={**found.state, "more": 1}), keep=2)
    after = {path.name: path.read_bytes() for path in (run / "step-000003").rglob("*") if path.is_file()}
    assert {name for name in after if after[name] != before[name]} == {"state.json", "checksums.json"}
    assert load_latest(run, report=pytest.fail).state["more"] == 1


def shard(path: Path, number: int = 2) -> Path:
    """The file of policy/ that a process wrote."""
    return path / "shards" / f"shard-0000{number}-model-00003-of-00003.safetensors"


def flip_a_bit(path: Path) -> None:
    content = bytearray(shard(path).read_bytes())
    content[len(content) // 2] ^= 1
    shard(path).write_bytes(content)


def a_file_instead(path: Path) -> None:
    shutil.rmtree(path / "shards")
    (path / "shards").write_text("x")


def sign(path: Path) -> None:
    """Writes the checksums of what is there."""
    files = [file for file in path.rglob("*") if file.is_file() and file.name != "checksums.json"]
    sums = {file.relative_to(path).as_posix(): checksum(file) for file in files}
    (path / "checksums.json").write_text(json.dumps({"format": 1, "sha256": sums}))


def without_one_signed(path: Path) -> None:
    shard(path).unlink()
    sign(path)


def without_one_signed_and_uncounted(path: Path) -> None:
    state = json.loads((path / "state.json").read_text())
    state["files"].remove(f"shards/{shard(path).name}")
    (path / "state.json").write_text(json.dumps(state))
    without_one_signed(path)


def emptied_and_signed(path: Path) -> None:
    shard(path).write_bytes(b"")
    sign(path)


def a_path_outside(path: Path) -> None:
    content = json.loads((path / "checksums.json").read_text())
    content["sha256"]["shards/../state.json"] = checksum(path / "state.json")
    (path / "checksums.json").write_text(json.dumps(content))


def a_folder_below(path: Path) -> None:
    content = json.loads((path / "checksums.json").read_text())
    content["sha256"]["shards/more/x.safetensors"] = "0" * 64
    (path / "checksums.json").write_text(json.dumps(content))


NAME = r"shards/shard-00002-model-00003-of-00003\.safetensors"
DAMAGES = {
    "missing": (lambda path: shard(path).unlink(), rf"{NAME} is missing"),
    "cut short": (lambda path: os.truncate(shard(path), 100), rf"{NAME} has a wrong checksum \(100 bytes\)"),
    "a bit flipped": (flip_a_bit, rf"{NAME} has a wrong checksum"),
    "of another process": (lambda path: shutil.copy(shard(path, 1), shard(path)), rf"{NAME} has a wrong checksum"),
    "of another checkpoint": (
        lambda path: shutil.copy(shard(path.with_name("step-000002")), shard(path)),
        rf"{NAME} has a wrong checksum",
    ),
    "a stranger's": (
        lambda path: shutil.copy(shard(path), path / "shards" / "x.safetensors"),
        r"shards/x\.safetensors is no file of it; move it away",
    ),
    "all gone": (lambda path: shutil.rmtree(path / "shards"), r"shards/shard-0000\d.* is missing"),
    "a file instead": (a_file_instead, r"shards/shard-0000\d.* is missing"),
    "missing, checksums right": (without_one_signed, rf"{NAME} is missing"),
    "missing and not counted": (without_one_signed_and_uncounted, r"shards holds \d+ of the 21 numbers of"),
    "emptied, checksums right": (emptied_and_signed, "shards cannot be read"),
    "a path outside": (a_path_outside, r"checksums.json lists 'shards/\.\./state.json', which is no file of it"),
    "a folder below": (a_folder_below, r"checksums.json lists 'shards/more/x.safetensors', which is no file of it"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_shards_are_named_and_the_checkpoint_before_is_used(run, name):
    damage, message = DAMAGES[name]
    damage(run / "step-000003")
    reports = []
    found = load_latest(run, report=reports.append, run=RUN)
    assert same(found, 2)
    (report,) = reports
    assert "step-000003" in report
    with pytest.raises(CheckpointError, match=message):
        load_step(run, 3)


def test_shards_of_another_run_are_passed_over(run):
    with pytest.raises(CheckpointError, match="is of another run, arm 'grpo', seed 0"):
        load_latest(run, run={**RUN, "seed": 1}, report=lambda line: None)


def test_what_a_killed_writer_left_is_ignored_and_removed(run):
    left = run / ".step-000004.tmp"
    shutil.copytree(run / "step-000003" / "shards", left / "shards")
    shard(left).write_bytes(b"half")
    assert same(load_latest(run, report=pytest.fail), 3)
    save(run, of_step(5), keep=2)
    assert sorted(path.name for path in run.iterdir()) == ["step-000003", "step-000005"]


def test_a_stray_folder_of_shards_in_a_checkpoint_of_whole_weights_is_left_alone(tmp_path):
    path = save(tmp_path, of_step(5), keep=1)
    (path / "shards").mkdir()
    (path / "shards" / "x.safetensors").write_bytes(b"none of it")
    assert same(load_latest(tmp_path, report=pytest.fail), 5)
